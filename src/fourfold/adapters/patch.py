"""What is patched in PEFT, all of it here. Both pieces answer for packed experts only and pass everything
else on.

`LoraModel._create_new_module`, which chooses the class of a wrapper, tries a fixed list of dispatchers and
has no registry (`LoraConfig._register_custom_module` is not saved with the adapter, so reloading would not
know it). On a packed parameter stock raises nothing and builds factors for the width of the packed bytes,
half of the real one.

`LoraModel._check_merge_allowed` is asked before any layer is merged. Without a word there, the refusal of the
first packed layer would leave the layers before it merged, and a later save without their factors.

No issue of PEFT asks for a registry of wrappers yet (up to 0.21); with one, the first piece ends, and the
second can become a method of what is registered.
"""

from __future__ import annotations

import functools
from typing import Any

from fourfold.experts import PackedExperts
from fourfold.experts.plain import PlainExperts

_MARK = "_fourfold"


def install() -> None:
    """Install the dispatch; once, whoever calls first.

    Called in the middle of importing PEFT, perhaps while a module of this folder is being imported that asked
    for it: so the wrapper is imported when it is first needed.
    """
    from peft.tuners.lora.model import LoraModel

    stock = LoraModel._create_new_module
    if getattr(stock, _MARK, False):
        return

    @functools.wraps(stock)
    def create_new_module(lora_config: Any, adapter_name: str, target: Any, **kwargs: Any) -> Any:
        base = target.get_base_layer() if hasattr(target, "get_base_layer") else target
        if isinstance(base, PackedExperts) and kwargs.get("parameter_name") is not None:
            from fourfold.adapters.wrapper import ParamWrapper, refuse_what_would_be_ignored

            refuse_what_would_be_ignored(lora_config, base)
            return ParamWrapper(target, adapter_name, config=lora_config, **kwargs)
        if isinstance(base, PlainExperts) and base.fourfold_layout.projection(
            kwargs.get("parameter_name") or ""
        ):
            from fourfold.adapters import plain_wrapper

            return plain_wrapper.ParamWrapper(target, adapter_name, config=lora_config, **kwargs)
        return stock(lora_config, adapter_name, target, **kwargs)

    setattr(create_new_module, _MARK, True)
    LoraModel._create_new_module = staticmethod(create_new_module)

    check_merge_allowed = LoraModel._check_merge_allowed

    @functools.wraps(check_merge_allowed)
    def check_merge(self: LoraModel) -> None:
        from fourfold.adapters.wrapper import ParamWrapper, refuse_merging

        if any(isinstance(module, ParamWrapper) for module in self.model.modules()):
            refuse_merging()
        check_merge_allowed(self)

    LoraModel._check_merge_allowed = check_merge
