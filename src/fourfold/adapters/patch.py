"""What is patched in PEFT, all of it here. All pieces answer for packed experts only and pass everything
else on.

`LoraModel._create_new_module`, which chooses the class of a wrapper, tries a fixed list of dispatchers and
has no registry (`LoraConfig._register_custom_module` is not saved with the adapter, so reloading would not
know it). On a packed parameter stock raises nothing and builds factors for the width of the packed bytes,
half of the real one.

`LoraModel._check_merge_allowed` is asked before any layer is merged. Without a word there, the refusal of the
first packed layer would leave the layers before it merged, and a later save without their factors.

`PeftModel.save_pretrained`, `load_adapter` and `from_pretrained`: ``fourfold.json`` is written beside every
adapter and read with it (`adapters.provenance`). PEFT has no hook there, and what saves adapters (Trainer,
TRL, a loop of one's own) calls the first of them directly. Stock's arguments and result are passed through.
`from_pretrained` is asked as well as `load_adapter`, which it calls, because by then it has put its wrappers
into the model.

A model that is sharded over ranks is put together first (`adapters.gather`): stock would save what this rank
holds.

`peft.utils.hotswap` reads an adapter's folder by itself, so it is asked as well; and what it does to flat
factors of another rank is made right there (`adapters.hotswap`).

No issue of PEFT asks for a registry of wrappers yet (up to 0.21); with one, the first piece ends, and the
second can become a method of what is registered.
"""

from __future__ import annotations

import functools
import inspect
import weakref
from contextvars import ContextVar
from pathlib import Path
from typing import Any

from fourfold.experts import PackedExperts
from fourfold.experts.part import refuse_spread
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
            from fourfold.adapters.wrapper import ParamWrapper

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


def install_provenance() -> None:
    """Install what writes and reads ``fourfold.json``; once, whoever calls first."""
    from peft.peft_model import PeftModel  # (`peft` itself is half-way imported)

    save, load, make = PeftModel.save_pretrained, PeftModel.load_adapter, PeftModel.from_pretrained
    if getattr(save, _MARK, False):
        return
    save_signature, load_signature = inspect.signature(save), inspect.signature(load)

    @functools.wraps(save)
    def save_pretrained(self: Any, *args: Any, **kwargs: Any) -> Any:
        from fourfold.adapters import gather, provenance

        bound = save_signature.bind(self, *args, **kwargs)
        bound.apply_defaults()
        names = bound.arguments["selected_adapters"] or list(self.peft_config)
        if bound.arguments["path_initial_model_for_weight_conversion"] is not None:
            _refuse_conversion(self, names)
        for name in names:
            if name in self.peft_config:  # (stock answers for the others)
                provenance.name_the_original(self, self.peft_config[name])
        given = bound.arguments["kwargs"].get("state_dict")  # (a trainer passes a None)
        if given is None:
            gather.refuse_taken_away(self)
        if gather.has_distributed_parameters(self) and given is None:
            bound.arguments["kwargs"]["state_dict"] = gather.gathered_adapters(self)
            bound.arguments["is_main_process"] = gather.is_first_rank()
            result = save(*bound.args, **bound.kwargs) if gather.is_first_rank() else None
        else:
            result = save(self, *args, **kwargs)
        if bound.arguments["is_main_process"]:
            for name in names:
                folder = Path(bound.arguments["save_directory"])
                provenance.write(self, folder if name == "default" else folder / name, name)
        return result

    @functools.wraps(load)
    def load_adapter(self: Any, model_id: Any, *args: Any, **kwargs: Any) -> Any:
        from fourfold.adapters import provenance

        init = provenance.check(self, model_id, **kwargs)
        result = load(self, model_id, *args, **kwargs)
        provenance.set_init(
            self, load_signature.bind(self, model_id, *args, **kwargs).arguments["adapter_name"], init
        )
        return result

    @functools.wraps(make.__func__)
    def from_pretrained(cls: Any, model: Any, model_id: Any, *args: Any, **kwargs: Any) -> Any:
        from fourfold.adapters import provenance

        provenance.check(model, model_id, **kwargs)
        return make.__func__(cls, model, model_id, *args, **kwargs)

    setattr(save_pretrained, _MARK, True)
    _install_in_the_mixin()
    PeftModel.save_pretrained = save_pretrained
    PeftModel.load_adapter = load_adapter
    PeftModel.from_pretrained = classmethod(from_pretrained)


def _refuse_conversion(model: Any, names: list[str]) -> None:
    """PEFT's ``[A, A0]`` is that of one matrix: of flat factors it gives experts each other's rows."""
    from fourfold.adapters.wrapper import ParamWrapper
    from fourfold.errors import AdapterError

    for module in model.modules():
        if isinstance(module, ParamWrapper) and any(name in module.lora_A for name in names):
            raise AdapterError(
                "path_initial_model_for_weight_conversion would mix up the experts' factors; save the "
                "adapter without it, and take off what it began with by `fourfold export ADAPTER OUT "
                "--layout fused --initial ADAPTER0`"
            )


# The folder that `hotswap_adapter` read last, and how, until its numbers are put into place.
_SWAPPED_IN: ContextVar[tuple[Any, Any, dict[str, Any]] | None] = ContextVar("_SWAPPED_IN", default=None)


def _holds(state: dict[str, Any], tensor: Any) -> bool:
    """(No: what was read last belongs to a swap that failed.)"""
    return any(value is tensor for value in state.values())


def install_hotswap() -> None:
    """``fourfold.json`` of an adapter whose numbers are put into the place of another's, and ranks and
    scalings of experts (`adapters.hotswap`); once.

    The two functions that `hotswap_adapter` is made of, and not itself: a program may have imported that
    before.
    """
    from peft.utils import hotswap

    load, swap = hotswap.load_peft_weights, hotswap.hotswap_adapter_from_state_dict
    if getattr(swap, _MARK, False):
        return
    signature = inspect.signature(swap)

    @functools.wraps(load)
    def load_peft_weights(model_id: Any, *args: Any, **kwargs: Any) -> Any:
        state = load(model_id, *args, **kwargs)
        first = next(iter(state.values()), None)
        _SWAPPED_IN.set(None if first is None else (weakref.ref(first), model_id, kwargs))
        return state

    @functools.wraps(swap)
    def hotswap_adapter_from_state_dict(*args: Any, **kwargs: Any) -> Any:
        from fourfold.adapters import provenance
        from fourfold.adapters.hotswap import set_scaling, widened

        source, init = _SWAPPED_IN.get(), None
        _SWAPPED_IN.set(None)
        given = signature.bind(*args, **kwargs).arguments
        model, name = given["model"], given["adapter_name"]
        refuse_spread(
            model,
            "another adapter's numbers are those of all of them",
            "Load it by `model.load_adapter` instead",
        )
        if source is not None and _holds(given["state_dict"], source[0]()):
            init = provenance.check(model, source[1], **source[2])
        given["state_dict"] = widened(model, given["state_dict"], name)
        result = swap(**given)
        set_scaling(model, name, given["config"])
        provenance.set_init(model, name, init)
        return result

    setattr(hotswap_adapter_from_state_dict, _MARK, True)
    hotswap.load_peft_weights = load_peft_weights
    hotswap.hotswap_adapter_from_state_dict = hotswap_adapter_from_state_dict


def _install_in_the_mixin() -> None:
    """The same for adapters that are added to, saved from and loaded into a transformers model itself."""
    from transformers import PreTrainedModel

    save, load = PreTrainedModel.save_pretrained, PreTrainedModel.load_adapter
    save_signature, load_signature = inspect.signature(save), inspect.signature(load)

    @functools.wraps(save)
    def save_pretrained(self: Any, *args: Any, **kwargs: Any) -> Any:
        if not getattr(self, "_hf_peft_config_loaded", False):
            return save(self, *args, **kwargs)
        from fourfold.adapters import provenance

        for name in self.active_adapters():
            provenance.name_the_original(self, self.peft_config[name])
        result = save(self, *args, **kwargs)
        bound = save_signature.bind(self, *args, **kwargs)
        bound.apply_defaults()
        if bound.arguments["is_main_process"]:
            provenance.write(self, bound.arguments["save_directory"], self.active_adapters()[0])
        return result

    @functools.wraps(load)
    def load_adapter(self: Any, peft_model_id: Any = None, *args: Any, **kwargs: Any) -> Any:
        from fourfold.adapters import provenance

        init = None
        if peft_model_id is not None:
            init = provenance.check(self, peft_model_id, **{**(kwargs.get("adapter_kwargs") or {}), **kwargs})
        result = load(self, peft_model_id, *args, **kwargs)
        name = load_signature.bind(self, peft_model_id, *args, **kwargs).arguments.get("adapter_name")
        provenance.set_init(self, name or "default", init)
        return result

    PreTrainedModel.save_pretrained = save_pretrained
    PreTrainedModel.load_adapter = load_adapter
