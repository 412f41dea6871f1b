/* One call that looks at all tensors of a plan: is everything where, and as, it was when the plan was made?

   As C++ it reads tensors through PyTorch's own headers (c10/core/TensorImpl.h); as C through DLPack's exchange table, which
   PyTorch offers to everybody, takes longer, and does not say whether a tensor is lazily negated or its storage was cut.
   Python's stable functions are declared here, and so is DLPack's table (version 1): nothing else is needed.
   The interpreter's lock is held throughout. */
#ifdef __cplusplus
#include <c10/core/ScalarTypeToTypeMeta.h>
#include <c10/core/TensorImpl.h>
extern "C" {
#endif
#include <stdint.h>

extern void *PyObject_GetAttr(void *, void *), *PyObject_Type(void *), *PyObject_CallFunctionObjArgs(void *, ...);
extern void *PyList_GetItem(void *, intptr_t);
extern intptr_t PyList_Size(void *);
extern int PyList_Append(void *, void *), PyDict_Next(void *, intptr_t *, void **, void **), PyObject_IsTrue(void *);
extern void Py_DecRef(void *), PyErr_Clear(void);

/* Small tables: what is looked at here, and what a step then works on, should stay in the cache together. */
typedef struct { int64_t device, kind, ndim, dims; } Form;  /* dims: where the shape and the strides are */
typedef struct { int64_t object, address, form; } Fact;
typedef struct { int64_t key, matters; } Key;  /* matters: 0 no, 1 its value must be the same, 2 its group is read again */
typedef struct { int64_t object, first, keys, count; } Dict;  /* where its values and its keys are */
typedef struct { int64_t object, first, count; } Params;  /* a group's list, its rows */
typedef struct {
    int64_t object, fact, slot, kind, counter;  /* fact: of the parameter, -1 where the engine does not hold addresses */
    int64_t born;                               /* 0: its first gradient changes the plan */
    int64_t last, shape, status;                /* of the gradient: last seen object and where its shape was; see below */
} Row;
typedef struct { int64_t address, members, active; } Counter;
typedef struct {
    const void *api;
    void *tensor, *parameter, *none, *grad, *is_neg, *is_conj, *is_short;
    void *groups, *state;
    int64_t group_count, row_count, fact_count, counter_count, state_count;  /* facts: of all but parameters, which follow */
    const Dict *dicts;  /* the groups, then the optimizer's state, then each parameter's */
    const Params *params;
    const Key *keys;
    const int64_t *values;
    const Form *forms;
    const Fact *facts;
    const int64_t *dims;
    Row *rows;
    Counter *counters;
    int64_t *dirty;   /* for each group, a bit for each of its first numbers that is another object, and one for all others */
    int64_t payload;  /* where in a Python tensor PyTorch's is */
    int64_t advance;  /* whether the counters are to be increased, if everything is as it was */
} Plan;

enum { MOST = 60 };
enum { CHANGED = 1, DIRTY = 2, ODD = 4, APART = 8 };
/* A row's status: no gradient, one that is read in place, one that has to be copied first, one for the reference. */
enum { ABSENT, READ, COPIED, LOOSE };

/* What is seen of a tensor. device: 0 or CUDA's 1, then the number; kind: as in DLPack; lazy: negated or conjugated, -1
   unknown; cut: not all of it is in its storage, as far as that is seen. */
typedef struct { int64_t address, device, kind, ndim, lazy, cut; const int64_t *shape, *strides; } Seen;

static int64_t kind(int64_t code, int64_t bits) { return code << 32 | bits << 16 | 1; }

#ifdef __cplusplus
static int64_t kind_of(c10::ScalarType type) {
    switch (type) {
    case c10::ScalarType::Float: return kind(2, 32);
    case c10::ScalarType::Double: return kind(2, 64);
    case c10::ScalarType::Half: return kind(2, 16);
    case c10::ScalarType::BFloat16: return kind(4, 16);
    case c10::ScalarType::ComplexHalf: return kind(5, 32);
    case c10::ScalarType::ComplexFloat: return kind(5, 64);
    case c10::ScalarType::ComplexDouble: return kind(5, 128);
    case c10::ScalarType::Byte: return kind(1, 8);
    case c10::ScalarType::Short: return kind(0, 16);
    case c10::ScalarType::Int: return kind(0, 32);
    case c10::ScalarType::Long: return kind(0, 64);
    default: return -1;
    }
}

/* Wrappers, sparse, fake and other tensors have further keys. Nothing more is asked of them: answers are somebody's code. */
static int see(const Plan *plan, void *object, Seen *seen) {
    const c10::TensorImpl *t = *(c10::TensorImpl *const *)((char *)object + plan->payload);
    if (!t) return -1;
    const c10::DispatchKeySet lazily({c10::DispatchKey::Negative, c10::DispatchKey::Conjugate});
    const auto all = t->key_set() - c10::autograd_dispatch_keyset_with_ADInplaceOrView - c10::autocast_dispatch_keyset;
    const auto own = all - lazily;
    const int cuda = own == c10::DispatchKeySet(c10::DispatchKey::CUDA);
    if (!cuda && own != c10::DispatchKeySet(c10::DispatchKey::CPU)) return -1;
    const auto sizes = t->sizes(), strides = t->strides();
    const int64_t item = (int64_t)t->itemsize(), offset = t->storage_offset();
    const auto &storage = t->unsafe_storage();
    if (!storage) return -1;
    int64_t last = offset;
    for (size_t d = 0; d < sizes.size(); d++) last += (sizes[d] - 1) * strides[d];
    seen->address = t->numel() ? (int64_t)storage.data() + offset * item : 0;
    seen->device = cuda ? (int64_t)1 << 32 | (uint32_t)t->device().index() : 0;
    seen->kind = kind_of(c10::typeMetaToScalarType(t->dtype()));
    seen->ndim = (int64_t)sizes.size();
    seen->lazy = all != own;
    seen->cut = t->numel() && (!storage.data() || (last + 1) * item > (int64_t)storage.nbytes());
    seen->shape = sizes.data();
    seen->strides = strides.data();
    return 0;
}

static const int sees_lazy = 1;
#else
typedef struct { int32_t type, id; } Device;
typedef struct { uint8_t code, bits; uint16_t lanes; } Kind;
typedef struct { char *data; Device device; int32_t ndim; Kind kind; int64_t *shape, *strides; uint64_t offset; } Tensor;
typedef struct {
    uint32_t major, minor; void *earlier;
    void *allocate, *managed, *import; int (*tensor)(void *, Tensor *); void *stream;
} Exchange;

static int see(const Plan *plan, void *object, Seen *seen) {
    Tensor t;
    if (((const Exchange *)plan->api)->tensor(object, &t)) { PyErr_Clear(); return -1; }
    int64_t count = 1;
    for (int32_t d = 0; d < t.ndim; d++) count *= t.shape[d];
    seen->address = count ? (int64_t)(t.data + t.offset) : 0;
    seen->device = t.device.type == 1 ? 0 : (int64_t)1 << 32 | (uint32_t)t.device.id;
    seen->kind = kind(t.kind.code, t.kind.bits);
    seen->ndim = t.ndim;
    seen->lazy = -1;
    seen->cut = 0;
    seen->shape = t.shape;
    seen->strides = t.strides;
    return 0;
}

static const int sees_lazy = 0;
#endif

static int has_type(void *object, const void *a, const void *b) {
    void *type = PyObject_Type(object);
    Py_DecRef(type);  /* the types are held elsewhere */
    return type == a || type == b;
}

static int as_it_was(const Plan *plan, const Fact *fact) {
    Seen t;
    const Form *form = plan->forms + fact->form;
    const int64_t *dims = plan->dims + form->dims;
    if (see(plan, (void *)fact->object, &t)) return 0;
    if (t.address != fact->address || t.ndim != form->ndim || t.kind != form->kind || t.device != form->device) return 0;
    for (int64_t d = 0; d < t.ndim; d++)
        if (t.shape[d] != dims[d] || t.strides[d] != dims[t.ndim + d]) return 0;
    return t.lazy <= 0 && !t.cut;
}

static int same_items(const Plan *plan, const Dict *dict, int64_t *dirty) {
    const Key *known = plan->keys + dict->keys;
    const int64_t *seen = plan->values + dict->first;
    void *key, *value;
    intptr_t at = 0;
    int64_t i = 0;
    for (; PyDict_Next((void *)dict->object, &at, &key, &value); i++) {
        if (i == dict->count || (int64_t)key != known[i].key) return 0;
        if (known[i].matters && (int64_t)value != seen[i]) {
            if (known[i].matters == 1) return 0;
            *dirty |= (int64_t)1 << (i < MOST ? i : MOST);
        }
    }
    return i == dict->count;
}

static int says(void *function, void *tensor) {
    void *answer = PyObject_CallFunctionObjArgs(function, tensor, (void *)0);
    int yes = answer ? PyObject_IsTrue(answer) : 1;
    if (!answer || yes < 0) { PyErr_Clear(); return 1; }
    Py_DecRef(answer);
    return yes;
}

/* What is to be done with a gradient, and its address. Where it is not seen whether it is lazy, it is asked: a new one may have
   the last one's place. Whether it is cut is asked of those alone that are not where the last step's was: cutting moves. */
static int64_t of_gradient(const Plan *plan, Row *row, void *g, int64_t *address) {
    const Fact *p = plan->facts + row->fact;
    const Form *form = plan->forms + p->form;
    const int64_t *dims = plan->dims + form->dims;
    Seen t;
    if (!has_type(g, plan->tensor, plan->parameter) || see(plan, g, &t)) return LOOSE;
    if (t.ndim != form->ndim || t.device != form->device) return LOOSE;
    int64_t apart = 0;
    for (int64_t d = 0; d < t.ndim; d++) {
        if (t.shape[d] != dims[d]) return LOOSE;
        apart |= t.shape[d] > 1 && t.strides[d] != dims[t.ndim + d];
    }
    if (t.kind != row->kind) return -1;
    if (t.cut) return LOOSE;
    if (t.lazy < 0) {
        const int known = row->last == (int64_t)g && row->shape == (int64_t)t.shape && *(int64_t *)row->slot == t.address;
        if (!known && says(plan->is_short, g)) return LOOSE;
        t.lazy = says(plan->is_neg, g) || (t.kind >> 32 == 5 && says(plan->is_conj, g));
        row->last = (int64_t)g;
        row->shape = (int64_t)t.shape;
    }
    *address = t.address;
    return apart || t.lazy > 0 || (t.address && t.address == p->address) ? COPIED : READ;
}

/* Count a step for every counter whose tensors have gradients; those without an address are counted elsewhere. */
void polyak_advance(const Plan *plan) {
    for (int64_t c = 0; c < plan->counter_count; c++) {
        const Counter *counter = plan->counters + c;
        if (counter->active && counter->address) *(float *)counter->address += 1;
    }
}

/* Whether this reads a tensor right: without touching anything but the object itself if it would not. */
int64_t polyak_reads(int64_t payload, void *object, int64_t shape, int64_t strides) {
#ifdef __cplusplus
    /* PyTorch's own tensor has its shape inside: by its address it is known that this is one. */
    const int64_t at = *(const int64_t *)((char *)object + payload);
    return shape > at && shape < at + (int64_t)sizeof(c10::TensorImpl) && strides > at && strides < at + (int64_t)sizeof(c10::TensorImpl);
#else
    (void)payload; (void)object; (void)shape; (void)strides;
    return 1;
#endif
}

/* grads: a list of gradients (None among them) for all rows, or None: they are asked for. Those that are read are put into
   `held`. Returns what is not as it was; rows say what is to be done with their gradients. */
int64_t polyak_look(Plan *plan, void *grads, void *held) {
    int64_t found = 0;
    const Dict *dict = plan->dicts;
    if (PyList_Size(plan->groups) != plan->group_count) return CHANGED;
    for (int64_t k = 0; k < plan->group_count; k++, dict++) {
        const Params *params = plan->params + k;
        if ((int64_t)PyList_GetItem(plan->groups, k) != dict->object) return CHANGED;
        int64_t dirty = 0;
        if (!same_items(plan, dict, &dirty)) return CHANGED;
        plan->dirty[k] |= dirty;
        if (plan->dirty[k]) found |= DIRTY;
        if (PyList_Size((void *)params->object) != params->count) return CHANGED;
        for (int64_t i = 0; i < params->count; i++)
            if ((int64_t)PyList_GetItem((void *)params->object, i) != plan->rows[params->first + i].object) return CHANGED;
    }
    for (int64_t k = 0; k <= plan->state_count; k++, dict++) {
        int64_t dirty = 0;
        if (!same_items(plan, dict, &dirty)) return CHANGED;
    }
    for (int64_t k = 0; k < plan->fact_count; k++)
        if (!as_it_was(plan, plan->facts + k)) return CHANGED;
    for (int64_t c = 0; c < plan->counter_count; c++) plan->counters[c].active = 0;
    for (int64_t r = 0; r < plan->row_count; r++) {
        Row *row = plan->rows + r;
        if (row->fact >= 0 && !as_it_was(plan, plan->facts + row->fact)) return CHANGED;
        if (row->fact >= 0 && !sees_lazy && says(plan->is_neg, (void *)row->object)) return CHANGED;
        void *g = grads == plan->none ? PyObject_GetAttr((void *)row->object, plan->grad) : PyList_GetItem(grads, r);
        int64_t address = 0;
        if (!g) { PyErr_Clear(); return CHANGED; }
        if (g == plan->none) row->status = ABSENT;
        else if (!row->born) row->status = -1;
        else if (row->fact < 0) row->status = LOOSE;
        else row->status = of_gradient(plan, row, g, &address);
        if (row->status == READ) {
            if (PyList_Append(held, g)) { PyErr_Clear(); row->status = -1; }
        } else {
            row->last = 0;
        }
        if (row->slot) *(int64_t *)row->slot = row->status == READ ? address : 0;
        if (grads == plan->none) Py_DecRef(g);
        if (row->status < 0) return CHANGED;
        if (row->status >= COPIED) found |= ODD;
        if (row->counter >= 0) plan->counters[row->counter].active += row->status != ABSENT;
    }
    for (int64_t c = 0; c < plan->counter_count; c++) {
        const Counter *counter = plan->counters + c;
        if (counter->active && counter->active != counter->members) found |= APART;
    }
    if (plan->advance && !found) polyak_advance(plan);
    return found;
}
#ifdef __cplusplus
}
#endif
