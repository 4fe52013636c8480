"""The effective settings of trtllm-build: it changes some flags without an error, and config.json shows that."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pydantic import BaseModel, ConfigDict

from trtqwen.diagnostics import EngineError
from trtqwen.engine.flags import NOT_IN_RESULT, Flags, flag_facts
from trtqwen.recipe import ServeRecipe

PAGED_CONTEXT = "use_paged_context_fmha"
_IN_CHECKPOINT = ("logits_dtype",)  # kept with the model's settings, not with the build's
_NEED_PAGED_CONTEXT = ("enable_chunked_context", "enable_kv_cache_reuse")


class SettingChange(BaseModel):
    """A setting that the builder changed; `because` is empty without a known reason."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    setting: str
    requested: str
    effective: str
    because: str = ""

    def __str__(self) -> str:
        reason = f": {self.because}" if self.because else ""
        return f"{self.setting}: asked {self.requested}, built {self.effective}{reason}"


def changed_settings(flags: Flags, config: Mapping[str, Any]) -> list[SettingChange]:
    """Compare the flags with an engine's config.json.

    A plugin with the flag `auto` may be recorded as `auto` or as the model's dtype. A setting that is not recorded
    counts as changed, because nothing shows that it has an effect.
    """
    dtype = config["pretrained_config"]["dtype"]
    changes = []
    for name, value in flags.items():
        if name in NOT_IN_RESULT:
            continue
        effective = _effective(name, config)
        if not any(_same(effective, accepted) for accepted in ([value, dtype] if value == "auto" else [value])):
            because = flag_facts().flags[name].changed_because or ""
            changes.append(
                SettingChange(setting=name, requested=_word(value), effective=_word(effective), because=because)
            )
    return changes


def check_promises(config: Mapping[str, Any], serve: ServeRecipe) -> None:
    """Refuse an engine that cannot be served as its recipe says.

    Args:
        config: the engine's config.json.

    Raises:
        EngineError: if the engine lacks a feature that a serving setting needs.
    """
    broken = [f"serve.{name}" for name in _NEED_PAGED_CONTEXT if getattr(serve, name)]
    if broken and not _effective(PAGED_CONTEXT, config):
        names = " and ".join(broken)
        raise EngineError(
            f"the engine was built without {PAGED_CONTEXT} "
            f"({flag_facts().flags[PAGED_CONTEXT].changed_because}), but {names} needs it",
            f"convert with a 16-bit KV cache, or set engine.{PAGED_CONTEXT} and {names} to false",
        )


def _effective(name: str, config: Mapping[str, Any]) -> Any:
    build: Mapping[str, Any] = config["build_config"]
    if name in _IN_CHECKPOINT:
        return config["pretrained_config"].get(name)
    return build[name] if name in build else build.get("plugin_config", {}).get(name)


def _same(effective: Any, value: Any) -> bool:
    off = value == "disable" and effective is None  # a plugin that is off is recorded as null
    return off or _word(effective) == _word(value)


def _word(value: Any) -> str:
    if isinstance(value, bool):
        return "enable" if value else "disable"
    return "nothing" if value is None else str(value).lower()
