"""A student as a Hugging Face model: the code that travels with an exported folder.

One configuration class and one model class serve every family. What is loaded is an instance of a class made for the
teacher's type, `base_model_type` in config.json: a subclass of the teacher's own class whose constructor swaps the
layers named in `operators`. So all that transformers knows of that class holds for the student too.

The model type in config.json is this project's own: without its code a folder is an error, never the teacher's
architecture with random attention.
"""

from __future__ import annotations

import contextlib
import dataclasses
import importlib
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor
from transformers import CONFIG_MAPPING, MODEL_FOR_CAUSAL_LM_MAPPING, AutoModelForCausalLM, PreTrainedConfig

from operators.config import (
    FirFilterConfig,
    HyenaConfig,
    ImplicitFilterConfig,
    ModalFilterConfig,
    OperatorConfig,
    SkipConfig,
    WindowConfig,
)
from operators.decoding.kept import frozen_filters
from orchestrator.distill.models.swap import decode_by, fit_errors, swap

MODEL_TYPE = "layerswap"
PACKAGE = "orchestrator.distill.models"
CODE = ("modeling_layerswap.py", "layerswap_operators.py", "layerswap_kernels.py")
AUTO_MAP = {
    "AutoConfig": "modeling_layerswap.LayerswapConfig",
    "AutoModelForCausalLM": "modeling_layerswap.LayerswapForCausalLM",
}
HUB_ARGUMENTS = ("cache_dir", "force_download", "local_files_only", "proxies", "revision", "subfolder", "token")
MADE = "Layerswap"  # what the names of classes that are made begin with
FILTERS = {"implicit": ImplicitFilterConfig, "modal": ModalFilterConfig, "fir": FirFilterConfig}


class LayerswapConfig:
    """The teacher's configuration, and what is swapped.

    Attributes:
        base_model_type: the teacher's model type, as "llama".
        operators: layer index (as text) -> configuration of what is there.
        step_mode, croppable: how swapped layers decode (`swap.decode_by`): with `step_mode="modal"` and
            `croppable=False` as arguments of `from_pretrained` from a state that does not grow.

    Raises `ValueError` for a type that the installed transformers does not know.
    """

    def __new__(cls, **values: Any) -> Any:
        made = cls if issubclass(cls, PreTrainedConfig) else config_class(values.get("base_model_type"))
        return object.__new__(made)

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> Any:
        """The configuration of plain values, those of config.json."""
        made: Any = config_class(config_dict.get("base_model_type"))
        values = {name: value for name, value in config_dict.items() if name != "model_type"}
        base: Any = super(LayerswapConfig, made)
        return base.from_dict(values, **kwargs)

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: Any, **kwargs: Any) -> Any:
        """The configuration in a folder or on the hub."""
        values, others = PreTrainedConfig.get_config_dict(pretrained_model_name_or_path, **kwargs)
        return cls.from_dict(values, **others)

    def save_pretrained(self, save_directory: Any, *others: Any, **kwargs: Any) -> None:
        """Write config.json and the code that loads it; a model that is saved, or sent to the hub, calls this."""
        super().save_pretrained(save_directory, *others, **kwargs)  # type: ignore[misc]
        for name, text in code().items():
            (Path(save_directory) / name).write_text(text, encoding="utf-8")

    @classmethod
    def register_for_auto_class(cls, auto_class: str = "AutoConfig") -> None:
        """Nothing: what is saved names the code that travels with it anyway, see `to_dict`."""

    def to_dict(self) -> dict[str, Any]:
        """Plain values, those of config.json."""
        values: dict[str, Any] = super().to_dict()  # type: ignore[misc]
        told = {"model_type": MODEL_TYPE, "architectures": ["LayerswapForCausalLM"], "auto_map": AUTO_MAP}
        return values | told


class LayerswapForCausalLM:
    """The teacher's model, the attention of some layers swapped.

    Every forward pass and every `generate` computes the filters of these layers anew, so that it sees the weights as
    they are; inside of `frozen_filters` they are computed once.
    """

    def __new__(cls, config: Any = None, *others: Any, **kwargs: Any) -> Any:
        return object.__new__(cls if issubclass(cls, torch.nn.Module) else model_class(config))

    def __init__(self, config: Any, *others: Any, **kwargs: Any) -> None:
        super().__init__(config, *others, **kwargs)  # type: ignore[call-arg]
        for layer, values in sorted((config.operators or {}).items(), key=lambda item: int(item[0])):
            _place(self, int(layer), operator_config(values))
        decode_by(self, config.step_mode, croppable=config.croppable)

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: Any, *others: Any, **kwargs: Any) -> Any:
        """The model in a folder or on the hub, see `PreTrainedModel.from_pretrained`."""
        made: Any = cls
        if not issubclass(cls, torch.nn.Module):
            where = {name: kwargs[name] for name in HUB_ARGUMENTS if name in kwargs}
            config = kwargs.get("config") or LayerswapConfig.from_pretrained(pretrained_model_name_or_path, **where)
            made = model_class(config)
        base: Any = super(LayerswapForCausalLM, made)
        return base.from_pretrained(pretrained_model_name_or_path, *others, **kwargs)

    @classmethod
    def is_custom_code(cls) -> bool:
        """What the teacher's class says: transformers fills the buffers that no file holds only where it is its own."""
        whole: Any = cls.__mro__[cls.__mro__.index(LayerswapForCausalLM) + 1]
        custom: bool = whole.is_custom_code()
        return custom

    def fit_errors(self) -> dict[int, Tensor]:
        """Relative errors (C,) of the filters of layers that decode by modes fitted to them, see `swap.fit_errors`."""
        return fit_errors(self)

    def frozen_filters(self) -> contextlib.AbstractContextManager[None]:
        """Inside, filters are computed once for all prompts; weights must not change there, see `kept`."""
        return frozen_filters(self)  # type: ignore[arg-type]


def config_class(model_type: Any) -> Any:
    """The configuration class of students whose teacher is of this model type."""
    if model_type not in CONFIG_MAPPING or CONFIG_MAPPING[model_type] not in MODEL_FOR_CAUSAL_LM_MAPPING:
        raise ValueError(
            f"base_model_type {model_type!r} is no causal language model of transformers {transformers.__version__}: "
            "install a version that has it, or import the package that registers it"
        )
    return _made(CONFIG_MAPPING[model_type])


def model_class(config: Any) -> Any:
    """The model class of a configuration that `LayerswapConfig` gave."""
    return MODEL_FOR_CAUSAL_LM_MAPPING[type(config)]


def _made(base: Any) -> Any:
    """The configuration class made from a teacher's, made with its model class and told to transformers at once."""
    name = MADE + base.__name__
    if name not in globals():
        fields = {
            "base_model_type": str,
            "operators": dict[str, Any] | None,
            "step_mode": str | None,
            "croppable": bool,
        }
        values = {"base_model_type": base.model_type, "operators": None, "step_mode": None, "croppable": True}
        own: dict[str, Any] = {"__module__": __name__, "__annotations__": fields, **values}
        config = globals()[name] = type(name, (LayerswapConfig, base), own)
        whole: Any = MODEL_FOR_CAUSAL_LM_MAPPING[base]
        own = {"__module__": __name__, "config_class": config}
        model = globals()[MADE + whole.__name__] = type(MADE + whole.__name__, (LayerswapForCausalLM, whole), own)
        AutoModelForCausalLM.register(config, model)
    return globals()[name]


def __getattr__(name: str) -> Any:
    """A class that was made, by its name, as pickle asks for it in another process."""
    base = getattr(transformers, name.removeprefix(MADE), None) if name.startswith(MADE) else None
    if base is None:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    _made(base if issubclass(base, PreTrainedConfig) else base.config_class)
    return globals()[name]


def _place(model: Any, layer: int, config: OperatorConfig) -> None:
    """Swap a layer; the operator awaits its weights where the model does, and is drawn at random where it was."""
    awaits = next(model.parameters()).is_meta
    if not awaits and isinstance(config, HyenaConfig | WindowConfig):
        config = dataclasses.replace(config, init="random")
    seed = 0 if awaits else int(torch.randint(2**62, ()))
    placed: Any = swap(model, [layer], config, torch.Generator().manual_seed(seed), initialise=not awaits)[0]
    placed.brought = []
    placed.register_forward_pre_hook(_bring_weights)
    placed.register_forward_hook(_give_weights_back, always_call=True)


def _bring_weights(placed: Any, _: Any) -> None:
    """Bring the weights of an operator that accelerate keeps elsewhere, on the CPU or on disk, for a pass.

    accelerate brings those of a module when it is called, and operators use some of theirs without calling what holds
    them.
    """
    first = next(placed.operator.parameters(), None)
    if first is not None and first.is_meta:
        for module in placed.operator.modules():
            hook: Any = getattr(module, "_hf_hook", None)
            if getattr(hook, "offload", False):
                hook.pre_forward(module)
                hook.offload = False  # until the whole operator is done with them
                placed.brought.append(module)


def _give_weights_back(placed: Any, *_: Any) -> None:
    """Undo `_bring_weights`."""
    while placed.brought:
        module = placed.brought.pop()
        module._hf_hook.offload = True
        module._hf_hook.post_forward(module, None)


def code() -> dict[str, str]:
    """Name -> text of the files that travel: those beside this one, or this package's, which `bundle` writes."""
    if __name__.startswith(PACKAGE):
        written: dict[str, str] = importlib.import_module(f"{PACKAGE}.bundle").bundle()
        return written
    return {name: (Path(__file__).parent / name).read_text(encoding="utf-8") for name in CODE}


def operator_config(values: dict[str, Any]) -> OperatorConfig:
    """The configuration object of plain values."""
    if values["kind"] == "skip":
        return SkipConfig(**values)
    if values["kind"] == "window":
        return WindowConfig(**values)
    filters = FILTERS[values["filter"].get("kind", "implicit")](**values["filter"])
    return HyenaConfig(**{**values, "filter": filters})
