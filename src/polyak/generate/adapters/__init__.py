"""Where parts of this room meet other libraries: one module per library, imported only by who uses it."""
