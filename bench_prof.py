import torch, time, sys
sys.path.insert(0, "bench")
import optim as B
from torch.profiler import profile, ProfilerActivity
for model in ("resnet50","gpt2","1b"):
  for name in ("AdamP", "AdamP, all projected"):
    ps=[torch.randn(s,device="cuda").requires_grad_() for s in B.MODELS[model]()]
    for p in ps: p.grad=torch.randn_like(p)
    o=B.ours(False)[name][1](ps)
    for _ in range(5): o.step()
    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CUDA]) as pr:
        for _ in range(10): o.step()
        torch.cuda.synchronize()
    print(model, name, {e.key[:12]: round(e.device_time_total/10,1) for e in pr.key_averages() if e.device_time_total>0})
    del o, ps; torch.cuda.empty_cache()
