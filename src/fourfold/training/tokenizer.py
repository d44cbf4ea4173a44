"""The base model's tokenizer: its special tokens and its chat template."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from fourfold.errors import ConfigurationError
from fourfold.training.dataset_keys import DatasetConfig
from fourfold.training.model_keys import SpecialTokens
from fourfold.training.schema import TrainConfig
from fourfold.training.templates import FAMILIES, is_of_family

# Turns between marks that many models know; written where a tokenizer brings no template of its own.
CHATML = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def load_tokenizer(name: str, special: SpecialTokens | None = None, trust_remote_code: bool = False) -> Any:
    """The base model's tokenizer, with a padding token; ``special`` names other tokens of its vocabulary."""
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(name, trust_remote_code=trust_remote_code)
    except Exception as error:  # by the tokenizer's class: a damaged file raises what its reader raises
        reason = f"{error}".strip().splitlines()[0] if f"{error}".strip() else type(error).__name__
        raise ConfigurationError(
            f"base_model: {name} gives no tokenizer ({reason}). It must be a folder with a model and its "
            "tokenizer, or a model's id on the hub (which must be within reach)."
        ) from error
    if not tokenizer("a", add_special_tokens=False)["input_ids"]:
        # (a folder without a tokenizer's files gives an empty one of the class that the model's type names)
        raise ConfigurationError(
            f"base_model: the tokenizer of {name} knows no text: its files are missing. Put those of the "
            "model that it was made of (tokenizer.json, tokenizer_config.json) beside config.json."
        )
    for role, tokens in special.model_dump(exclude_none=True).items() if special is not None else ():
        known = tokenizer.get_vocab()
        unknown = [token for token in ([tokens] if isinstance(tokens, str) else tokens) if token not in known]
        if unknown:
            raise ConfigurationError(
                f"special_tokens.{role}: {unknown[0]!r} is not in the vocabulary of {name}, and tokens "
                "cannot be added yet. Name one that it has."
            )
        tokenizer.add_special_tokens({role: tokens})
    if tokenizer.pad_token is None and tokenizer.eos_token is None:
        raise ConfigurationError(
            f"base_model: the tokenizer of {name} has neither a pad_token nor an eos_token, so batches "
            "cannot be padded. Add one to its tokenizer_config.json."
        )
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def _check_family(config: TrainConfig, name: str, own: str | None) -> None:
    """A family's name is taken for the tokenizer's own template, where it has one and is of that family."""
    from fourfold.loading.skeleton import read_config

    kind = read_config(config.base_model, trust_remote_code=config.trust_remote_code).model_type
    remedy = "Write tokenizer_default for the model's own, or jinja with chat_template_jinja."
    if not is_of_family(name, kind):
        raise ConfigurationError(
            f"chat_template: {name} is the template of another family than "
            f"{config.base_model} ({kind}), and not here. {remedy}"
        )
    if not own:
        raise ConfigurationError(
            f"chat_template: {name} is the family of {config.base_model}, and its tokenizer "
            "brings no template. Take its chat variant, or write jinja with chat_template_jinja."
        )


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigurationError(f"chat_template_jinja: {path} cannot be read as text ({error}).") from None


def _check_jinja(tokenizer: Any, template: str, where: str) -> None:
    """What is no Jinja at all is said of the template, not of the first conversation that it meets."""
    from jinja2 import TemplateSyntaxError

    turns = [{"role": "user", "content": "a"}]
    try:
        tokenizer.apply_chat_template(turns, chat_template=template, tokenize=False)
    except TemplateSyntaxError as error:
        raise ConfigurationError(
            f"chat_template_jinja: {where}, line {error.lineno}: {error.message}. Mend the template."
        ) from None
    except Exception:  # (whatever it makes of this one turn: the data's own are what counts)
        return


def choose_template(config: TrainConfig, tokenizer: Any, entry: DatasetConfig | None = None) -> str | None:
    """The chat template that ``chat_template`` means for this tokenizer: the run's, or that of one dataset.

    Raises:
        ConfigurationError: it is another family's, or written with tokens that the vocabulary lacks.
    """
    own: str | None = tokenizer.chat_template
    asked = config if entry is None else entry
    name = str(asked.chat_template)
    if name == "jinja":
        given = str(asked.chat_template_jinja)
        path = Path(given)
        is_file = "{" not in given and path.is_file()
        if not is_file and "{" not in given:
            raise ConfigurationError(f"chat_template_jinja: there is no file {given}. Name one.")
        text = _read(path) if is_file else given
        _check_jinja(tokenizer, text, str(path) if is_file else "the text given")
        return text
    if name in FAMILIES:
        _check_family(config, name, own)
        return own
    if name == "tokenizer_default" or (own and name != "chatml"):
        return own
    missing = [token for token in ("<|im_start|>", "<|im_end|>") if token not in tokenizer.get_vocab()]
    if missing:
        raise ConfigurationError(
            f"chat_template: chatml is written with {missing[0]}, which {config.base_model} has no "
            "token for. Use tokenizer_default, or jinja with chat_template_jinja."
        )
    return CHATML
