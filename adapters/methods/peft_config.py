"""PEFT's LoRA configuration: which keys mean something, which mean nothing at inference, which are refused.

Must not know: tensors, effects. Every key is in exactly one table below; a key in none is an error, because a key
that is skipped is how adapters load "successfully" and answer wrongly.

Source: fields of peft 0.21 `LoraConfig` and `PeftConfig`; matching rules as its `check_target_module_exists` and
`get_pattern_key` define them.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from motet.adapters.base import BaseModel, Kind
from motet.adapters.errors import ConfigError, UnsupportedError
from motet.adapters.methods.config_values import (
    NUMBERED_LAYER,
    Value,
    boolean,
    layer_numbers,
    modules,
    names,
    number,
    one_of,
    pattern_table,
    patterns,
    positive_int,
    token_table,
)

ANY_LAYER = r".*?\.[^.]*\.(?P<idx>\d+)\."
"""Where PEFT finds the layer's number when no pattern says."""

SERVED = frozenset(
    "alpha_pattern bias exclude_modules init_lora_weights layers_pattern layers_to_transform lora_alpha lora_bias "
    "modules_to_save peft_type r rank_pattern target_modules trainable_token_indices use_dora use_rslora".split()
)
"""Keys that change the result and are honoured."""

INERT = frozenset(
    "auto_mapping base_model_name_or_path inference_mode lora_dropout megatron_core monteclora_config peft_version "
    "qalora_group_size revision runtime_config task_type velora_config".split()
)
"""Keys that change training only, or nothing."""

NEUTRAL: Mapping[str, tuple[tuple[Any, ...], str]] = {
    "alora_invocation_tokens": ((None, []), "adapters that switch on at invocation tokens"),
    "arrow_config": ((None,), "Arrow's per-token routing"),
    "corda_config": ((None,), "CorDA, which changes the base model"),
    "ensure_weight_tying": ((None, False), "adapters on tied layers"),
    "eva_config": ((None,), "EVA"),
    "fan_in_fan_out": ((None, False), "transposed base weights"),
    "kasa_config": ((None,), "KaSA, which truncates the base model"),
    "layer_replication": ((None, []), "replicated layers"),
    "loftq_config": ((None, {}), "LoftQ, which replaces the base model by its own quantised residual"),
    "lora_ga_config": ((None,), "LoRA-GA, which changes the base model"),
    "megatron_config": ((None,), "Megatron layers"),
    "target_parameters": ((None, []), "adapters on bare parameters"),
    "use_bdlora": ((None, False), "block-diagonal LoRA"),
    "use_qalora": ((None, False), "QALoRA"),
}
"""Keys that are accepted only while they say nothing: (values that say nothing, what the key would mean)."""

INERT_WITH: Mapping[str, str] = {"eva_config": "eva"}
"""NEUTRAL keys that may say anything beside this `init_lora_weights`: they only shaped the initial adapter."""

PLAIN_INITS = (True, False, None, "gaussian", "orthogonal", "eva", "mica")
"""`init_lora_weights` values that leave the base model untouched, so that the saved pair is the whole change."""

BASE_CHANGING_INITS: Mapping[str, str] = {
    "pissa": "PiSSA",
    "corda": "CorDA",
    "olora": "OLoRA",
    "loftq": "LoftQ",
    "lora_ga": "LoRA-GA",
}
"""Stems of `init_lora_weights` values that take something out of the base model before training."""


@dataclass(frozen=True, slots=True)
class PeftLoraConfig:
    """A checked configuration of the LoRA family.

    Attributes:
        target_modules, exclude_modules: a regular expression for the whole path, or path endings.
        layers_to_transform: layer numbers, or None for all.
        modules_to_save: endings of the paths of modules that were trained as a whole.
        trained_tokens: ending of a module's path, or None for the input embedding → the tokens whose rows were trained.
        rank_pattern, alpha_pattern: (regular expression for a path with the ending, value), first match wins.
    """

    r: int
    lora_alpha: float
    use_rslora: bool
    use_dora: bool
    bias: str
    lora_bias: bool
    target_modules: str | tuple[str, ...]
    exclude_modules: str | tuple[str, ...]
    layers_to_transform: frozenset[int] | None
    layers_pattern: tuple[str, ...]
    modules_to_save: tuple[str, ...]
    trained_tokens: Mapping[str | None, tuple[int, ...]]
    rank_pattern: tuple[tuple[re.Pattern[str], int], ...]
    alpha_pattern: tuple[tuple[re.Pattern[str], float], ...]

    def rank(self, module: str) -> int:
        """Rank for the module at this path."""
        return _first_match(self.rank_pattern, module, self.r)

    def scale(self, module: str) -> float:
        """Factor of B A for the module at this path: alpha/r, or alpha/sqrt(r) for rank-stabilised LoRA."""
        alpha, rank = _first_match(self.alpha_pattern, module, self.lora_alpha), self.rank(module)
        return float(alpha) / (rank**0.5 if self.use_rslora else rank)

    @property
    def scaling_rule(self) -> str:
        return "alpha/sqrt(r)" if self.use_rslora else "alpha/r"

    def expected_targets(self, base: BaseModel) -> frozenset[str]:
        """Targets of the base that the configuration names.

        Raises:
            UnsupportedError: it names a module with weights that is not a target of the base.
        """
        if isinstance(self.target_modules, str) and self.target_modules.lower() == "all-linear":
            linears = (name for name, target in base.targets.items() if target.kind is Kind.LINEAR)
            return frozenset(name for name in linears if not self._matches(self.exclude_modules, name))
        named = {name for name in (*base.targets, *base.other_modules) if self._names(name)}
        if others := named - base.targets.keys():
            if untargeted := sorted(others & base.no_targets.keys()):
                raise UnsupportedError(
                    f"target_modules names {untargeted[0]!r}, on which {base.name!r} takes no adapters: "
                    f"{base.no_targets[untargeted[0]]}; re-train without it, or with it in modules_to_save"
                )
            raise UnsupportedError(
                f"target_modules names {sorted(others)[0]!r}, which is not among the linear layers of {base.name!r} "
                "that adapters can be served on; re-train without it"
            )
        return frozenset(named)

    def _names(self, module: str) -> bool:
        if self._matches(self.exclude_modules, module) or not self._matches(self.target_modules, module):
            return False
        if self.layers_to_transform is None or isinstance(self.target_modules, str) or module in self.target_modules:
            return True
        return self._layer(module) in self.layers_to_transform

    def _layer(self, module: str) -> int | None:
        rules = [NUMBERED_LAYER.format(pattern) for pattern in self.layers_pattern]
        found = next((match for rule in rules or [ANY_LAYER] if (match := re.match(rule, module))), None)
        return int(found["idx"]) if found and found["idx"] else None

    @staticmethod
    def _matches(rule: str | tuple[str, ...], module: str) -> bool:
        if isinstance(rule, str):
            return re.fullmatch(rule, module) is not None
        return any(module == ending or module.endswith(f".{ending}") for ending in rule)


def init_stem(config: Mapping[str, Any]) -> str | None:
    """The base-changing initialisation that the configuration names, "pissa" for "pissa_niter_4"; else None."""
    stem = str(config.get("init_lora_weights")).split("_niter")[0]
    return stem if stem in BASE_CHANGING_INITS else None


def parse(config: Mapping[str, Any], honoured: frozenset[str] = frozenset(), stem: str | None = None) -> PeftLoraConfig:
    """Check every key of an adapter_config.json of the LoRA family.

    Args:
        honoured: further keys, which the calling method checks itself.
        stem: the base-changing initialisation that the calling method undoes.

    Raises:
        ConfigError: a key is unknown, missing or impossible.
        UnsupportedError: a key asks for something that cannot be served exactly.
    """
    _check_keys(config, honoured)
    if stem is None or init_stem(config) != stem:
        _check_init(config.get("init_lora_weights", True))
    rank, alpha = config.get("r"), config.get("lora_alpha")
    parsed = PeftLoraConfig(
        r=positive_int("r", rank),
        lora_alpha=number("lora_alpha", alpha),
        use_rslora=boolean(config, "use_rslora"),
        use_dora=boolean(config, "use_dora"),
        bias=one_of("bias", config.get("bias", "none"), ("none", "lora_only", "all")),
        lora_bias=boolean(config, "lora_bias"),
        target_modules=modules("target_modules", config.get("target_modules")),
        exclude_modules=modules("exclude_modules", config.get("exclude_modules") or ()),
        layers_to_transform=layer_numbers(config.get("layers_to_transform")),
        layers_pattern=patterns("layers_pattern", config.get("layers_pattern") or ()),
        modules_to_save=names("modules_to_save", config.get("modules_to_save") or ()),
        trained_tokens=token_table("trainable_token_indices", config.get("trainable_token_indices") or {}),
        rank_pattern=pattern_table("rank_pattern", config.get("rank_pattern") or {}, positive_int),
        alpha_pattern=pattern_table("alpha_pattern", config.get("alpha_pattern") or {}, number),
    )
    if not parsed.target_modules:
        raise ConfigError("target_modules is empty: the adapter would change nothing; save it again with PEFT")
    if isinstance(parsed.target_modules, str) and parsed.layers_to_transform is not None:
        raise ConfigError(
            "layers_to_transform has no meaning beside a pattern in target_modules; name the layers in one"
        )
    if parsed.use_dora and parsed.lora_bias:
        raise ConfigError("use_dora and lora_bias exclude each other in PEFT; set one of them to false")
    return parsed


def _check_keys(config: Mapping[str, Any], honoured: frozenset[str]) -> None:
    if config.get("peft_type") != "LORA":
        raise UnsupportedError(f"peft_type {config.get('peft_type')!r} is not served; LORA (with its variants) is")
    for key, value in config.items():
        if key in SERVED or key in INERT or key in honoured:
            continue
        if key not in NEUTRAL:
            raise ConfigError(
                f"adapter_config.json has the unknown key {key!r} ({value!r}); skipping it could change the answers, "
                "so the adapter is refused: remove the key if it has no effect"
            )
        neutral, meaning = NEUTRAL[key]
        inert = key in INERT_WITH and config.get("init_lora_weights") == INERT_WITH[key]
        if value not in neutral and not inert:
            raise UnsupportedError(f"{key}={value!r} asks for {meaning}, which is not served")


def _check_init(init: object) -> None:
    if any(init is plain or (isinstance(plain, str) and init == plain) for plain in PLAIN_INITS):
        return
    if (stem := init_stem({"init_lora_weights": init})) is not None:
        raise UnsupportedError(
            f"init_lora_weights={init!r}: {BASE_CHANGING_INITS[stem]} trains on a changed base model, so this pair is "
            "not the whole change, and the rest cannot be found here; convert the adapter to plain LoRA where it was "
            "trained, and load that"
        )
    raise ConfigError(f"init_lora_weights={init!r} is unknown; whether it changes the base model cannot be told")


def _first_match(table: Sequence[tuple[re.Pattern[str], Value]], module: str, default: Value) -> Value:
    return next((value for pattern, value in table if pattern.match(module)), default)
