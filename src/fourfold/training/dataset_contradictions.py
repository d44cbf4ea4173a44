"""Settings of a dataset that contradict each other, or have no effect with its type."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from fourfold.training.dataset_keys import ROLES
from fourfold.training.yaml_file import Problem, nearest

if TYPE_CHECKING:
    from fourfold.training.dataset_keys import DatasetConfig
    from fourfold.training.schema import TrainConfig

# Keys that are about turns.
OF_TURNS = (
    "field_messages",
    "message_property_mappings",
    "roles",
    "roles_to_train",
    "train_on_eos",
    "message_field_training",
    "chat_template",
    "chat_template_jinja",
    "drop_system_message",
)
# Types beside chats whose records may hold turns.
MAY_HOLD_TURNS = ("prompt_completion",)
Found = Iterator[tuple[tuple[str, ...], Problem]]


def dataset_contradictions(config: TrainConfig) -> Found:
    """Every contradiction within an entry of ``datasets`` and ``test_datasets``."""
    for name in ("datasets", "test_datasets"):
        for index, entry in enumerate(getattr(config, name) or ()):
            for key, what, remedy in _within(entry, config.train_on_inputs):
                yield (name, "train_on_inputs"), Problem(f"{name}.{index}.{key}", what, remedy)


def _within(entry: DatasetConfig, train_on_inputs: bool) -> Iterator[tuple[str, str, str]]:
    words = [word for each in entry.roles.values() for word in each]
    for word in sorted({word for word in words if words.count(word) > 1}):
        yield "roles", f"`{word}` stands for two roles", "Leave it in one of them."
    given = {key for key in OF_TURNS if getattr(entry, key) != _default(entry, key)}
    if not entry.is_chat and entry.type not in MAY_HOLD_TURNS:
        for key in sorted(given):
            yield key, "is about turns, and this type has none", "Drop it, or see type: chat_template."
        given = set()
    if entry.field != _default(entry, "field") and entry.type != "completion":
        yield "field", "names the text of type: completion", "Drop it, or set type: completion."
    unknown = [word for word in entry.roles_to_train if word not in (*ROLES, *words)]
    if unknown:
        yield "roles_to_train", f"`{unknown[0]}` is no role here", nearest(unknown[0], [*ROLES, *words])
    if train_on_inputs and "roles_to_train" in given:
        what = "train_on_inputs: true trains every turn, whoever speaks"
        yield "roles_to_train", what, "Keep one of the two."
    if (entry.chat_template == "jinja") != (entry.chat_template_jinja is not None):
        key = "chat_template" if entry.chat_template == "jinja" else "chat_template_jinja"
        yield key, "chat_template: jinja and chat_template_jinja belong together", "Give both, or neither."
    if entry.message_field_training in ("role", "content", "weight"):
        what = f"`{entry.message_field_training}` has a meaning of its own"
        yield "message_field_training", what, "Name another field."


def _default(entry: DatasetConfig, key: str) -> object:
    return type(entry).model_fields[key].get_default(call_default_factory=True)
