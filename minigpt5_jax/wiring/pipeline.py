"""The model a user holds: texts and PIL images in, texts and PIL images out."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from absl import logging
from PIL import Image

from minigpt5_jax.data.errors import DataError
from minigpt5_jax.data.images import encode_image, load_image
from minigpt5_jax.data.text.templates import find_special
from minigpt5_jax.inference.conversation import (
    Conversation,
    ImagePart,
    Message,
    dialog_prompt,
    story_prompt,
)
from minigpt5_jax.inference.prompts import text_prompt
from minigpt5_jax.inference.session import Generation, Prompt, Session, mixed_seed
from minigpt5_jax.training.provenance import Meta, stage_of
from minigpt5_jax.wiring.compile_cache import set_compile_cache
from minigpt5_jax.wiring.restore import config_of, describe, open_run
from minigpt5_jax.wiring.saved import as_stored, save_model
from minigpt5_jax.wiring.session import LoadedModel, dialog_window, override

Picture = Image.Image | np.ndarray | Path | bytes
Part = str | Picture
Chat = Sequence[Mapping[str, Any]]
ROLES = ("user", "assistant")
FROM_RUN = ("git_revision", "packages", "data")
"""What a description keeps of the training, whoever saves the model later."""


@dataclasses.dataclass(frozen=True, eq=False)
class Answer:
    """What the model wrote and drew.

    Attributes:
      parts: texts and RGB PIL images, in the order in which they were written.
      seed: of this answer.
      notes: what a reader should know, such as how much of the history did not fit.
    """

    parts: tuple[str | Image.Image, ...]
    seed: int
    notes: tuple[str, ...] = ()

    @property
    def text(self) -> str:
        """Its texts, joined by spaces."""
        return " ".join(part for part in self.parts if isinstance(part, str))

    @property
    def images(self) -> list[Image.Image]:
        """Its images."""
        return [part for part in self.parts if not isinstance(part, str)]

    def message(self) -> dict[str, Any]:
        """The answer as a message of a chat."""
        content = [
            {"type": "text", "text": part} if isinstance(part, str) else {"type": "image", "image": part}
            for part in self.parts
        ]
        return {"role": "assistant", "content": content}


class MiniGPT5:
    """A trained model, ready to answer with interleaved texts and images.

    Use :meth:`from_pretrained`; then :meth:`generate` for single answers, :meth:`chat` for a conversation and
    :meth:`save_pretrained` to take the trained part elsewhere.

    Args:
      model: a model with its weights, as ``load_run`` and ``load_pretrained`` return it.
      meta: what its checkpoint says of the training, where there is one.
      inherited: pretrained parameters that its training had in a form of its own.
    """

    def __init__(self, model: LoadedModel, meta: Meta | None = None, inherited: Sequence[str] = ()):
        self.model = model
        self._meta, self._inherited = dict(meta or {}), tuple(inherited)
        self._sessions: dict[tuple[tuple[str, Any], ...], Session] = {}

    def __repr__(self) -> str:
        return f"MiniGPT5({self.model.config.run.name!r}, stage {self.stage}, step {self.model.step})"

    @property
    def config(self) -> Any:
        """The configuration of its training (a ``ConfigDict``)."""
        return self.model.config

    @property
    def stage(self) -> int:
        """1 for a model trained on captions, 2 for one trained on stories or dialogues."""
        return stage_of(self.config.to_dict())

    # -- in and out -----------------------------------------------------------------------------

    @classmethod
    def from_pretrained(
        cls,
        path: str | os.PathLike[str],
        *,
        step: int | None = None,
        weights: Mapping[str, str | os.PathLike[str]] | None = None,
        **inference: Any,
    ) -> MiniGPT5:
        """Open a trained model; nothing is downloaded.

        Args:
          path: a folder of :meth:`save_pretrained`, a run's workdir, a Hugging Face id that is in the local
            cache (``hf download ORG/NAME``), or ``"shapes"``, the small model that ships with the package.
          step: which checkpoint of a run; by default the newest that can be read.
          weights: where frozen weights lie that have moved, by their names under ``config.weights``.
          inference: settings in the place of the run's (``sampler="ddim"``, ``do_sample=False``), by their
            names under ``config.inference``.

        Raises:
          CheckpointError: nothing there, a folder of a newer version, or other frozen weights than the model
            was trained on.
          ConfigError: a source of frozen weights is missing, or an unknown setting.
        """
        given = {name: os.fspath(value) for name, value in (weights or {}).items()}
        run = open_run(path, step=step, weights=given, inference=_spelled(inference))
        set_compile_cache(run.config)
        inherited = run.reader.paths("inherited", run.step)
        return cls(run.load(), run.meta, inherited)

    def save_pretrained(
        self,
        save_directory: str | os.PathLike[str],
        *,
        dtype: str | None = None,
        push_to_hub: bool = False,
        repo_id: str | None = None,
    ) -> Path:
        """Write what was trained as a folder that :meth:`from_pretrained` opens.

        It holds ``config.json``, ``model.safetensors`` (the trained part), the tokenizer, and ``README.md``,
        a model card with the frozen sources by name and hash and the licences that hold for the whole.

        Args:
          save_directory: made if need be; an earlier saved model in it is replaced.
          dtype: of the numbers (``"float16"``); by default as they were trained.
          push_to_hub: upload the folder as well, see :meth:`push_to_hub`.
          repo_id: where to; by default the folder's name, below the account that is logged in.

        Raises:
          FileExistsError: the folder holds other things.
        """
        stored = as_stored(self.model, self._inherited, dtype)
        # Of the training: settings of this session are not the model's.
        config = config_of(self._meta) if self._meta else self.config.copy_and_resolve_references()
        config.weights.update(self.config.weights)
        stored = dataclasses.replace(stored, config=config)
        meta = describe(config, stored.spec, stored.params)
        meta |= {name: self._meta[name] for name in FROM_RUN if name in self._meta}
        folder = save_model(stored, meta, save_directory, inherited=self._inherited, dtype=dtype)
        if push_to_hub:
            _upload(folder, repo_id or folder.absolute().name, None)
        return folder

    def push_to_hub(self, repo_id: str, *, private: bool | None = None, dtype: str | None = None) -> str:
        """Upload what :meth:`save_pretrained` writes; returns the address.  Nothing else uploads anything.

        Args:
          repo_id: ``ORG/NAME`` on the Hugging Face hub; you must be logged in (``hf auth login``).
          private: whether a new repository is private; None for the account's default.
        """
        import tempfile

        with tempfile.TemporaryDirectory() as folder:
            return _upload(self.save_pretrained(Path(folder) / "model", dtype=dtype), repo_id, private)

    # -- answers --------------------------------------------------------------------------------

    def generate(
        self,
        prompt: Part | Sequence[Part] | Chat,
        *,
        seed: int = 0,
        num_inference_steps: int | None = None,
        guidance_scale: float | None = None,
        max_new_tokens: int | None = None,
        max_images: int | None = None,
        **inference: Any,
    ) -> Answer:
        """Answer a prompt with texts and images.

        The same prompt, seed and settings give the same answer.

        Args:
          prompt: a text or an image; a list of texts (``str``) and images (PIL, ``uint8[H W 3]``,
            ``pathlib.Path`` or the ``bytes`` of a file) in order; or a chat, a list of messages
            ``{"role": "user" | "assistant", "content": ...}`` that ends in a user's, where ``content`` is a
            text or a list of ``{"type": "text", "text": ...}`` and
            ``{"type": "image", "image": ...}``.  A first message of role ``system`` is the system prompt.
            A model of stage 1 takes a text as a caption.
          seed: of everything that is drawn, 0 ... 2**32 - 1.
          num_inference_steps: denoising steps of each image.
          guidance_scale: how closely images follow the text; 1 switches guidance off.
          max_new_tokens: tokens of the answer at most, an image counting as one.
          max_images: images of the answer at most; 0 for text alone.
          inference: any other setting of ``config.inference`` (``temperature``, ``top_p``, ``force_image``).

        Returns:
          the answer; ``answer.parts`` are its texts and PIL images in order.

        Raises:
          DataError: an empty message, text that spells a token of the model (``[IMG0]``, ``###``), roles out
            of order, an image that cannot be read, or more images than the model can read at once.
          ConfigError: an unknown setting or one out of range, or more images than there are positions for.
        """
        given = {
            "num_inference_steps": num_inference_steps,
            "guidance_scale": guidance_scale,
            "max_new_tokens": max_new_tokens,
            "max_images": max_images,
        }
        settings = {name: value for name, value in given.items() if value is not None} | inference
        made, notes = self.prompt(prompt, seed)
        [answer] = self._session(settings).generate([made])
        return _answer(answer, notes)

    def chat(self, *, system: str | None = None, seed: int = 0) -> Conversing:
        """A conversation with this model that remembers what was said.

        Args:
          system: system prompt; by default the one that the model was trained with.
          seed: of the whole conversation.
        """
        if self.stage == 1:
            logging.warning(
                "this model is of stage 1, trained on single captions: do not expect it to hold a "
                "conversation; a stage-2 model learns that"
            )
        return Conversing(self, [] if system is None else [{"role": "system", "content": system}], seed)

    def _session(self, settings: Mapping[str, Any]) -> Session:
        """The session of these settings, which stays compiled."""
        spelled = _spelled(settings)
        key = tuple(sorted(spelled.items()))
        if key not in self._sessions:
            config = override(self.config.copy_and_resolve_references(), spelled)
            self._sessions[key] = dataclasses.replace(self.model, config=config).session(batch_size=1)
        return self._sessions[key]

    def prompt(
        self, prompt: Part | Sequence[Part] | Chat, seed: int = 0, *, story: bool = False
    ) -> tuple[Prompt, list[str]]:
        """(what the model reads, notes about it for whoever asked).

        Args:
          prompt, seed: as for :meth:`generate`.
          story: a chat is a story so far, whoever said what, and its next scene is asked for.

        Raises:
          DataError: as :meth:`generate`.
        """
        style = self.model.spec.parts["backbone"].prompts
        parts = _listed(prompt)
        if parts and isinstance(parts[0], Mapping):
            system, messages = _messages(parts, style.end, story)
        else:
            system, messages = None, [Message("user", _parts(parts, "the prompt", style.end))]
            if self.stage == 1 and not story and all(isinstance(part, str) for part in parts):
                return dataclasses.replace(text_prompt(" ".join(parts), [], dialog=False), seed=seed), []
        self._check_room(messages[-1])
        if story:
            return dataclasses.replace(story_prompt(Conversation("", 0, messages), "", style), seed=seed), []
        window, notes = dialog_window(self.config), []
        if window is not None and len(messages) > window:
            notes.append(f"the last {window} of {len(messages)} messages were read, as in training")
        system = style.dialog_system if system is None else system
        conversation = Conversation("", 0, messages, system=system)
        return dataclasses.replace(dialog_prompt(conversation, window, style), seed=seed), notes

    def _check_room(self, message: Message) -> None:
        """Refuse more images in one message than fit; of a history the oldest turns go instead."""
        each, room = self.model.spec.backbone.image_tokens, self.config.data.max_length
        count = sum(isinstance(part, ImagePart) for part in message.parts)
        if count and not each:
            raise DataError("this model has no vision tower and cannot read images")
        if count * each >= room:
            raise DataError(
                f"the message has {count} images of {each} positions each, and this model reads {room} "
                f"positions (data.max_length): give at most {(room - 1) // each}, and leave room for text"
            )


class Conversing:
    """A conversation: each message is answered with all that was said before it.

    Attributes:
      messages: what was said, in the form that :meth:`MiniGPT5.generate` takes; may be edited.
      answers: the model's answers, in order.
    """

    def __init__(self, model: MiniGPT5, messages: list[dict[str, Any]], seed: int = 0):
        self.model, self.messages, self.seed = model, messages, seed
        self.answers: list[Answer] = []

    def send(self, message: Part | Sequence[Part], **settings: Any) -> Answer:
        """The model's answer to a message; both are remembered.

        Args:
          message: a text, or a list of texts and images in order.
          settings: as for :meth:`MiniGPT5.generate`; a ``seed`` takes the place of the conversation's.

        Raises:
          DataError, ConfigError: as :meth:`MiniGPT5.generate`; nothing is remembered then.
        """
        content = [
            {"type": "text", "text": part} if isinstance(part, str) else {"type": "image", "image": part}
            for part in _listed(message)
        ]
        said = {"role": "user", "content": content}
        settings = {"seed": mixed_seed(self.seed, len(self.answers)), **settings}
        answer = self.model.generate([*self.messages, said], **settings)
        self.answers.append(answer)
        self.messages.append(said)
        if answer.parts:
            self.messages.append(answer.message())
        return answer


def _listed(given: Any) -> list[Any]:
    """Parts of a prompt, or messages of a chat; one text or image alone is a list of one."""
    return [given] if isinstance(given, str | bytes | Path | np.ndarray | Image.Image) else list(given)


def _spelled(settings: Mapping[str, Any]) -> dict[str, str]:
    """Settings as Python spells them, which :func:`override` reads."""
    return {name: value if isinstance(value, str) else repr(value) for name, value in settings.items()}


def _answer(answer: Generation, notes: Sequence[str]) -> Answer:
    parts = tuple(part if isinstance(part, str) else Image.fromarray(part) for part in answer.parts)
    cut = f"the oldest turns did not fit: {answer.dropped} positions of the prompt were left out"
    return Answer(parts, answer.seed, (*notes, *[cut] * bool(answer.dropped)))


def _messages(chat: Chat, end: str, story: bool) -> tuple[str | None, list[Message]]:
    """(system prompt or None, turns) of a chat; DataError for one that cannot be put to a model.

    The turns of a ``story`` may come from anyone.
    """
    system, turns = None, list(chat)
    if turns[0].get("role") == "system":
        values = _values(turns.pop(0).get("content"), "the system prompt")
        if not values or not all(isinstance(value, str) for value in values):
            raise DataError("the system prompt must be text")
        system = "\n".join(values)
        _check_text(system, "the system prompt", end)
    messages: list[Message] = []
    for number, turn in enumerate(turns, 1):
        role, content = turn.get("role"), turn.get("content")
        if role not in ROLES:
            raise DataError(
                f"message {number} has role {role!r}; known: user, assistant, and system as the first"
            )
        if messages and messages[-1].role == role == "assistant" and not story:
            raise DataError(f"messages {number - 1} and {number} are both the assistant's; join them in one")
        what = f"message {number}"
        messages.append(Message(role, _parts(_values(content, what), what, end)))
    if not messages or (messages[-1].role != "user" and not story):
        raise DataError("a chat ends in a message of the user, which is answered; the last one is not")
    return system, messages


def _values(content: Any, what: str) -> list[Any]:
    """Texts and images of a message's content."""
    return [content] if isinstance(content, str) else [_value(part, what) for part in content or ()]


def _value(part: Any, what: str) -> Any:
    """Text or image of one part of a message; an image that is a string is the path of a file."""
    if isinstance(part, Mapping):
        image = part.get("image", part.get("path"))
        if part.get("type") == "text" and isinstance(part.get("text"), str):
            return part["text"]
        if part.get("type") == "image" and image is not None:
            return Path(image) if isinstance(image, str) else image
    elif isinstance(part, str | Image.Image | np.ndarray | Path | bytes):
        return part
    raise DataError(
        f'{what}: expected {{"type": "text", "text": ...}} or {{"type": "image", "image": ...}}, '
        f"found {type(part).__name__}"
    )


def _parts(values: Sequence[Any], what: str, end: str) -> tuple[str | ImagePart, ...]:
    """Texts and images as a conversation holds them."""
    parts: list[str | ImagePart] = []
    for value in values:
        if isinstance(value, str):
            _check_text(value, what, end)
            parts += [value.strip()] if value.strip() else []
        else:
            parts.append(ImagePart(_image(value, what)))
    if not parts:
        raise DataError(f"{what} is empty")
    return tuple(parts)


def _check_text(text: str, what: str, end: str) -> None:
    """Refuse text that the model would read as something else."""
    if special := find_special(text):
        raise DataError(
            f"{what} contains {special}, a token of the model; give images as images, not as text"
        )
    if end in text:
        raise DataError(f"{what} contains {end}, which ends a turn; leave it out")


def _image(value: Any, what: str) -> bytes | Path:
    """An image as the model's readers take it."""
    if isinstance(value, Path | bytes):
        load_image(value)
        return value
    if isinstance(value, np.ndarray):
        if value.dtype != np.uint8 or value.ndim != 3 or value.shape[-1] != 3:
            raise DataError(f"{what}: an array must be uint8[H W 3], found {value.dtype}{list(value.shape)}")
        value = Image.fromarray(value)
    if not isinstance(value, Image.Image):
        raise DataError(
            f"{what}: expected texts and images (PIL, uint8[H W 3], pathlib.Path or bytes), "
            f"found {type(value).__name__}"
        )
    return encode_image(value)


def _upload(folder: Path, repo_id: str, private: bool | None) -> str:
    """Address of the commit."""
    from huggingface_hub import HfApi

    api = HfApi()
    repository = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
    # Files of an earlier upload that this one does not have would be read with it.
    return str(api.upload_folder(repo_id=repository, folder_path=folder, delete_patterns=["model*"]))
