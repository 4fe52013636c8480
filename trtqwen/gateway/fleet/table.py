"""The table of models: a YAML file with the engines of each model name."""

from __future__ import annotations

import fcntl
import hashlib
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from trtqwen.artifact.manifest import load_manifest
from trtqwen.diagnostics import InputError, SettingError, first_hint, first_problem
from trtqwen.gateway.config import Address, GatewayConfig
from trtqwen.yaml_file import read_mapping

Name = Annotated[str, Field(min_length=1, max_length=128, pattern=r"^[A-Za-z0-9][A-Za-z0-9._:/-]*$")]
TargetName = Annotated[str, Field(min_length=1, max_length=64, pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")]
Sticky = Literal["key", "user", "none"]
_HEADING = "# The models of this gateway. `trtqwen models` and the admin routes change this file; so may you.\n"

Parsed = TypeVar("Parsed", bound=BaseModel)


class Target(BaseModel):
    """An engine that serves a model, or a shadow of it.

    Attributes:
        name: tells it from the model's other targets, in metrics and reports.
        repository: the model repository that its Tritons serve.
        triton: host:port of each replica's gRPC endpoint; None is a Triton that `trtqwen serve` starts.
        gpus: numbers of the GPUs for a Triton that `serve` starts; None is all that are visible.
        weight: its share of the model's requests is this weight over the sum of all.
        shadow: share of the model's requests that are copied to it, 0 to 1; its answers reach no client.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: TargetName
    repository: Path
    triton: Annotated[tuple[Address, ...], Field(min_length=1)] | None = None
    gpus: Annotated[tuple[Annotated[int, Field(ge=0)], ...], Field(min_length=1)] | None = None
    weight: Annotated[float, Field(ge=0, allow_inf_nan=False)] | None = None
    shadow: Annotated[float, Field(gt=0, le=1)] | None = None

    @model_validator(mode="after")
    def _serves_or_shadows(self) -> Target:
        if self.shadow is not None and self.weight:
            raise SettingError(f"target {self.name}: has both weight and shadow", "remove one of them")
        if self.gpus is not None and self.triton is not None:
            raise SettingError(f"target {self.name}: gpus is for a Triton that `serve` starts", "remove it or triton")
        return self

    @property
    def place(self) -> str:
        """Return a name for the Tritons that `serve` starts; a repository that is written again gets a new name.

        Raises:
            InputError: if the repository is not finished.
        """
        key = load_manifest(self.repository, "repository").key
        return f"{self.repository}@{key[:12]}" + "".join(f":{gpu}" for gpu in self.gpus or ())

    @property
    def share(self) -> float:
        """The weight; 1 unless another one is given or the target is a shadow."""
        if self.weight is not None:
            return self.weight
        return 0.0 if self.shadow is not None else 1.0


class ModelEntry(BaseModel):
    """The entry of one model.

    Attributes:
        aliases: further names that clients may use.
        sticky: what stays with one target: an API key, a user (the request's field `user`, else the key), or nothing.
            Requests without either are spread by chance.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    targets: Annotated[tuple[Target, ...], Field(min_length=1)]  # the stable one first
    aliases: tuple[Name, ...] = ()
    sticky: Sticky = "key"

    @model_validator(mode="after")
    def _one_answers(self) -> ModelEntry:
        names = [target.name for target in self.targets]
        if len(set(names)) < len(names):
            raise SettingError(f"two targets have the name {max(names, key=names.count)}", "give each its own")
        if not any(target.share for target in self.targets):
            raise SettingError("no target has a weight, so that none would answer", "give one a weight")
        return self

    @property
    def stable(self) -> Target:
        """The target that others are compared with: the first one that is not a shadow."""
        return next(target for target in self.targets if target.shadow is None)


class ModelTable(BaseModel):
    """All models of a gateway.

    Attributes:
        default: the model for requests that name none; None is the first one.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    models: Annotated[dict[Name, ModelEntry], Field(min_length=1)]
    default: Name | None = None

    @model_validator(mode="after")
    def _names_and_addresses(self) -> ModelTable:
        if self.default is not None and self.default not in self.models:
            raise SettingError(
                f"default is {self.default}, which is not a model of the table", "name one of its models"
            )
        names = [*self.models, *(alias for entry in self.models.values() for alias in entry.aliases)]
        if len(set(names)) < len(names):
            raise SettingError(f"the name {max(names, key=names.count)} is given twice", "rename one of them")
        addresses = [
            address for entry in self.models.values() for target in entry.targets for address in target.triton or ()
        ]
        if len(set(addresses)) < len(addresses):
            raise SettingError(
                f"two targets have the Triton at {max(addresses, key=addresses.count)}",
                "give an engine one target, and further names as aliases",
            )
        return self

    @property
    def first(self) -> str:
        """The model for requests that name none."""
        return self.default or next(iter(self.models))

    def with_entry(self, name: str, entry: ModelEntry | None) -> ModelTable:
        """The table with another entry for a model, or without the model.

        Raises:
            InputError: if the result is no table.
        """
        models = {other: known for other, known in self.models.items() if other != name}
        default = self.default
        if entry is not None:
            models = {**self.models, name: entry}
        elif default == name:
            default = None
        if not models:
            raise InputError(f"{name}: is the only model", "replace it: a gateway serves at least one")
        return parse_table({"models": {key: known.model_dump() for key, known in models.items()}, "default": default})


def parse_table(content: Any, where: str = "models") -> ModelTable:
    """Parse a table from the content of a file or a request.

    Raises:
        InputError: naming the field that cannot be used.
    """
    return _parse(ModelTable, content, where)


def parse_entry(content: Any, where: str) -> ModelEntry:
    """Parse an entry from the content of a request.

    Raises:
        InputError: naming the field that cannot be used.
    """
    return _parse(ModelEntry, content, where)


def _parse(kind: type[Parsed], content: Any, where: str) -> Parsed:
    try:
        return kind.model_validate(content)
    except ValidationError as problem:
        raise InputError(f"{where}: {first_problem(problem)}", first_hint(problem) or "correct it") from None


def read_table(path: Path) -> ModelTable:
    """Read a table; repositories are relative to its directory.

    Raises:
        InputError: if the file cannot be read or used.
    """
    table = parse_table(read_mapping(path), str(path))
    home = path.absolute().parent
    models = {
        name: entry.model_copy(
            update={
                "targets": tuple(
                    target.model_copy(update={"repository": home / target.repository}) for target in entry.targets
                )
            }
        )
        for name, entry in table.models.items()
    }
    return table.model_copy(update={"models": models})


def write_table(path: Path, table: ModelTable) -> None:
    """Replace the file atomically: a reader sees the old table or the new one."""
    content = table.model_dump(mode="json", exclude_none=True, exclude_defaults=True)
    partial = path.with_name(f".{path.name}.{os.getpid()}")
    with partial.open("w", encoding="utf-8") as file:
        file.write(_HEADING + yaml.safe_dump(content, sort_keys=False, allow_unicode=True))
        file.flush()
        os.fsync(file.fileno())
    if path.exists():
        partial.chmod(path.stat().st_mode & 0o777)
    partial.replace(path)


def file_state(path: Path | None) -> tuple[int, ...]:
    """Return a value that changes with the file."""
    if path is None:
        return ()
    try:
        status = path.stat()
    except OSError:
        return ()
    return status.st_ino, status.st_size, status.st_mtime_ns


def revision(table: ModelTable) -> str:
    """Return a digest of the table's content."""
    return hashlib.sha256(table.model_dump_json().encode()).hexdigest()[:16]


@contextmanager
def exclusively(path: Path) -> Iterator[None]:
    """Lock the table against other writers, in this and other processes.

    Raises:
        BlockingIOError: if another one holds it.
    """
    with path.with_name(f".{path.name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield


def first_table(config: GatewayConfig) -> ModelTable:
    """The table that a gateway begins with: that of its file, or one model from its own settings.

    Raises:
        InputError: if the file cannot be used.
    """
    if config.models is not None:
        return read_table(config.models)
    assert config.repository is not None  # the config's own check
    name = config.model_name or config.repository.resolve().name
    target = Target.model_construct(
        name="engine", repository=config.repository, triton=config.triton, gpus=None, weight=None, shadow=None
    )
    entry = ModelEntry.model_construct(targets=(target,), aliases=(), sticky="key")
    return ModelTable.model_construct(models={name: entry}, default=None)
