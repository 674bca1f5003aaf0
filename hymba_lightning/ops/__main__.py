"""`python -m hymba_lightning.ops`: the backends of every op as Markdown."""

from hymba_lightning.ops import registry

registry.register_all()
print(registry.as_markdown())
