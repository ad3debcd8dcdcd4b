"""The processor: pictures and messages -> model inputs, generated ids -> text and pictures.

It holds the text tokenizer, the image processor and the image tokenizer of one merged folder, and
the image vocabulary that joins them. The language model is not in it.
"""

import json
import os
import shutil
from collections import Counter
from collections.abc import Sequence
from itertools import islice
from pathlib import Path
from typing import Any, Literal, cast

import torch
from PIL import Image
from torch import Tensor
from transformers import AutoTokenizer, BatchFeature
from transformers.processing_utils import ProcessorMixin

from tokenizer_hf.errors import (
    CheckpointError,
    ConfigurationError,
    MessageError,
    MismatchError,
    VocabularyError,
)
from tokenizer_hf.files import atomic_folder, atomic_write
from tokenizer_hf.image_processing_image_tokenizer import ImageTokenizerImageProcessor
from tokenizer_hf.modeling_image_tokenizer import ImageTokenizer
from tokenizer_hf.vocabulary import ImageVocabulary, VocabularyExtension, neutralise
from unimodal.messages import (
    IGNORED,
    ImagePart,
    Message,
    Rendered,
    fill_images,
    parse,
    render,
    render_text,
    with_codes,
)
from unimodal.remote_code import add_remote_code

PROCESSOR_FILE = "processor_config.json"
IMAGE_TOKENIZER_FOLDER = "image_tokenizer"
CAPTION_INSTRUCTION = "Describe the picture."
DRAW_INSTRUCTION = "Draw: {prompt}"
DRAW_DEFAULTS: dict[str, Any] = {
    "guidance": 3.0,
    "temperature": 1.0,
    "top_k": None,
    "candidates": 1,
}
"""How a model draws whose folder says nothing else."""
NOT_YET = (128, 128, 128)  # RGB of what a preview does not know yet
IMAGES_PER_BATCH = 64  # encoded or decoded at once; codes do not depend on it


class UnimodalProcessor(ProcessorMixin):
    """Messages with pictures <-> the token ids of a merged model.

    Args:
        image_processor: PIL <-> pixel_values of the image tokenizer.
        tokenizer: the extended text tokenizer.
        vq_model: the image tokenizer. None is enough where every picture comes as codes. (The name
            avoids "tokenizer": ProcessorMixin would take it for a text tokenizer.)
        image_vocabulary: an ImageVocabulary, or its ``to_dict()``.
        caption_instruction: what ``caption_messages`` says after the picture.
        draw_instruction: what ``draw_messages`` says; holds ``{prompt}``.
        draw_settings: how this model draws best: some of ``guidance``, ``temperature``, ``top_k``,
            ``candidates``. They are the defaults of every way to draw; `unimodal choose-sampling`
            finds them.
        chat_template: used in place of the tokenizer's own.

    Raises:
        MismatchError: the vocabulary's ids are not the tokenizer's, or its fingerprint is not the
            image tokenizer's.
    """

    def __init__(
        self,
        image_processor: Any,
        tokenizer: Any,
        vq_model: ImageTokenizer | None = None,
        image_vocabulary: ImageVocabulary | dict[str, Any] | None = None,
        caption_instruction: str = CAPTION_INSTRUCTION,
        draw_instruction: str = DRAW_INSTRUCTION,
        draw_settings: dict[str, Any] | None = None,
        chat_template: str | None = None,
    ) -> None:
        template = tokenizer.chat_template if chat_template is None else chat_template
        super().__init__(image_processor, tokenizer, chat_template=template)
        if image_vocabulary is None:
            raise VocabularyError(
                "a processor without image_vocabulary; give the ImageVocabulary of extend_tokenizer"
            )
        if isinstance(image_vocabulary, dict):
            image_vocabulary = cast(ImageVocabulary, ImageVocabulary.from_dict(image_vocabulary))
        if "{prompt}" not in draw_instruction:
            raise MessageError(
                f'draw_instruction {draw_instruction!r}; expected a "{{prompt}}" in it'
            )
        unknown = set(draw_settings or {}) - set(DRAW_DEFAULTS)
        if unknown:
            raise ConfigurationError(
                f"draw_settings has {min(unknown)!r}; expected some of {', '.join(DRAW_DEFAULTS)}"
            )
        self._vocabulary = image_vocabulary
        self.image_vocabulary = image_vocabulary.to_dict()
        self.vq_model = vq_model
        self.caption_instruction = caption_instruction
        self.draw_instruction = draw_instruction
        self.draw_settings = {**DRAW_DEFAULTS, **(draw_settings or {})}
        _require_match(tokenizer, vq_model, image_vocabulary)

    @property
    def vocabulary(self) -> ImageVocabulary:
        """The image vocabulary bound to this tokenizer's ids."""
        return self._vocabulary

    @property
    def image_token(self) -> str:
        """What stands for a picture in a text that ``__call__`` is given: start and end string."""
        return self.vocabulary.start_string + self.vocabulary.end_string

    # --- messages -> ids --------------------------------------------------------------------------

    def caption_messages(self, image: Any) -> list[Message]:
        """The conversation that asks for a caption of ``image`` (PIL, path, bytes, data URI)."""
        part = image if isinstance(image, dict) else {"type": "image", "image": image}
        instruction = {"type": "text", "text": self.caption_instruction}
        return [{"role": "user", "content": [part, instruction]}]

    def draw_messages(self, prompt: str, images: Sequence[Message] = ()) -> list[Message]:
        """The conversation that asks for a drawing. The empty prompt is the unconditional one: what
        training's prompt dropout shows, and what guidance leads away from. ``images`` are image
        parts that the drawing takes up; they stand before the instruction."""
        instruction = self.draw_instruction.replace("{prompt}", prompt)
        if not images:
            return [{"role": "user", "content": instruction}]
        return [{"role": "user", "content": [*images, {"type": "text", "text": instruction}]}]

    def render(
        self, messages: Sequence[Message], *, add_generation_prompt: bool = False, **values: Any
    ) -> Rendered:
        """One conversation as ids, labels and image spans; see :func:`unimodal.messages.render`."""
        [rendered] = self.render_batch(
            [messages], add_generation_prompt=add_generation_prompt, **values
        )
        return rendered

    def render_batch(
        self,
        conversations: Sequence[Sequence[Message]],
        *,
        add_generation_prompt: bool = False,
        chat_template: str | None = None,
        **values: Any,
    ) -> list[Rendered]:
        """Render several conversations; their pictures are encoded together."""
        return [
            render(
                messages,
                self.tokenizer,
                self.vocabulary,
                add_generation_prompt=add_generation_prompt,
                chat_template=chat_template or self._own_template(),
                **values,
            )
            for messages in with_codes(conversations, self._encoder())
        ]

    def apply_chat_template(  # type: ignore[override]
        self,
        conversation: Sequence[Message] | Sequence[Sequence[Message]],
        chat_template: str | None = None,
        *,
        add_generation_prompt: bool = False,
        tokenize: bool = False,
        return_tensors: str | None = None,
        return_dict: bool = False,
        return_labels: bool = False,
        padding: bool | Literal["longest", "max_length"] = False,
        padding_side: Literal["left", "right"] | None = None,
        max_length: int | None = None,
        **values: Any,
    ) -> Any:
        """Word one conversation or a batch of them by the model's chat template.

        Args:
            conversation: messages, or a list of conversations. Image parts may stand in any turn;
                see ``unimodal/messages.py`` for their shapes.
            tokenize: False gives the text (a picture is an unfilled start-end pair).
            return_tensors: "pt" or "np"; one conversation then has shape (1, T).
            return_dict: a BatchFeature with ``input_ids`` and ``attention_mask`` in place of the
                ids.
            return_labels: adds ``labels``, -100 where nothing is learnt (padding too). Implies
                return_dict.
            padding: True or "longest", or "max_length".
            padding_side: "left" if ``add_generation_prompt`` is set (generation continues every row
                at its right end), else the tokenizer's.
            max_length: a conversation of more ids is refused; cutting one could cut a picture.
            values: variables of the template, ``tools=...`` for example.

        Raises:
            MessageError, ImageError, CodeError: as :func:`unimodal.messages.render`.
        """
        batched = bool(conversation) and not isinstance(conversation[0], dict)
        conversations = cast(
            Sequence[Sequence[Message]], conversation if batched else [conversation]
        )
        if not tokenize:
            texts = [
                render_text(
                    messages,
                    self.tokenizer,
                    self.vocabulary,
                    add_generation_prompt=add_generation_prompt,
                    chat_template=chat_template or self._own_template(),
                    **values,
                )
                for messages in conversations
            ]
            return texts if batched else texts[0]
        rows = self.render_batch(
            conversations,
            add_generation_prompt=add_generation_prompt,
            chat_template=chat_template,
            **values,
        )
        data: dict[str, Any] = self._batch(
            [row.input_ids for row in rows],
            [row.labels for row in rows] if return_labels else None,
            padding=padding,
            side=padding_side or ("left" if add_generation_prompt else self.tokenizer.padding_side),
            max_length=max_length,
            return_tensors=return_tensors,
        )
        if not batched and return_tensors is None:
            data = {key: value[0] for key, value in data.items()}
        features = BatchFeature(data, tensor_type=return_tensors)
        return features if return_dict or return_labels else features["input_ids"]

    def __call__(
        self,
        images: Any = None,
        text: str | Sequence[str] | None = None,
        *,
        return_tensors: str | None = None,
        padding: bool | Literal["longest", "max_length"] = False,
        padding_side: Literal["left", "right"] | None = None,
        max_length: int | None = None,
        add_special_tokens: bool = True,
    ) -> BatchFeature:
        """Tokenize texts that are worded already; pictures go where ``image_token`` stands.

        Control tokens in the text count (it may come from ``apply_chat_template(tokenize=False)``),
        so give what a stranger wrote to ``apply_chat_template`` instead. The spelling of a code
        never becomes that code. A text without any ``image_token`` has its pictures in front.

        Args:
            images: a picture, or a list with the pictures of all texts in order, or one list a
                text. Without text they become ``pixel_values`` (B, 3, H, W), float32 in [-1, 1].
            text: a string or a list of strings.
            add_special_tokens: False leaves out the bos token; it is never put twice.

        Returns:
            ``input_ids`` and ``attention_mask``, always one row a text.

        Raises:
            MessageError: numbers of pictures and of markers that differ.
            ImageError: a picture that cannot be read.
        """
        if text is None:
            if images is None:
                raise MessageError("neither text nor images; expected at least one of them")
            return self.image_processor(_flat(images), return_tensors="pt")
        texts = [text] if isinstance(text, str) else list(text)
        codes_of_texts = self._images_of(texts, images)
        rows = []
        for one, codes in zip(texts, codes_of_texts, strict=True):
            one = neutralise(one, frozenset(self.vocabulary.code_strings()))
            if self.image_token not in one:
                one = self.image_token * len(codes) + one
            bos = self.tokenizer.bos_token
            special = add_special_tokens and not (bos and one.startswith(bos))
            ids = self.tokenizer(one, add_special_tokens=special, verbose=False)["input_ids"]
            rows.append(fill_images(ids, self.vocabulary, codes))
        data = self._batch(
            rows,
            None,
            padding=padding,
            side=padding_side or self.tokenizer.padding_side,
            max_length=max_length,
            return_tensors=return_tensors,
        )
        return BatchFeature(data, tensor_type=return_tensors)

    # --- ids -> messages --------------------------------------------------------------------------

    def parse(self, ids: Sequence[int] | Tensor) -> list[dict[str, Any]]:
        """Split the ids of one reply into parts that a message can hold again.

        Returns:
            ``{"type": "text", "text"}`` and ``{"type": "image", "codes", "image"}``, the image a
            PIL RGB picture; without an image tokenizer there is no "image".

        Raises:
            MessageError: a malformed picture, see :func:`unimodal.messages.parse`.
        """
        return self.parse_batch([ids])[0]

    def parse_batch(
        self, rows: Sequence[Sequence[int] | Tensor] | Tensor
    ) -> list[list[dict[str, Any]]]:
        """Parse several replies; their pictures are decoded together."""
        replies: list[list[dict[str, Any]]] = []
        pictures: list[dict[str, Any]] = []
        for row in rows:
            reply: list[dict[str, Any]] = []
            for part in parse(row, self.tokenizer, self.vocabulary):
                if isinstance(part, ImagePart):
                    reply.append({"type": "image", "codes": part.codes})
                    pictures.append(reply[-1])
                else:
                    reply.append({"type": "text", "text": part.text})
            replies.append(reply)
        if self.vq_model is not None and pictures:
            decoded = self.decode_codes([picture["codes"] for picture in pictures])
            for picture, image in zip(pictures, decoded, strict=True):
                picture["image"] = image
        return replies

    # --- pictures <-> codes -----------------------------------------------------------------------

    def encode_images(self, images: Any, num_tokens: int | None = None) -> Tensor:
        """Encode pictures, 64 at a time, on the device of the image tokenizer.

        Args:
            images: a picture or a list: PIL, path, bytes, numpy.
            num_tokens: codes of each picture, where the tokenizer is nested.

        Returns:
            codes on the CPU: int64 (B, L), or (B, L, G) with several codebooks.
        """
        model = self._require_model()
        batches = []
        sources = _flat(images)
        for first in range(0, len(sources), IMAGES_PER_BATCH):
            chunk = sources[first : first + IMAGES_PER_BATCH]
            pixels = self.image_processor(chunk, return_tensors="pt")["pixel_values"]
            with torch.inference_mode():
                codes = model.encode(pixels.to(model.device, model.dtype), num_tokens=num_tokens)
            batches.append(codes.cpu())
        return torch.cat(batches).clone() if batches else torch.empty(0, 0, dtype=torch.int64)

    def decode_codes(self, codes: Tensor | Sequence[Any]) -> list[Image.Image]:
        """Decode codes, in batches of equal length.

        Args:
            codes: (B, L) or (B, L, G), a tensor or a list whose rows may differ in length.

        Raises:
            CodeError: a length or a code that the image tokenizer does not have.
        """
        model = self._require_model()
        rows = [torch.as_tensor(row, dtype=torch.int64) for row in codes]
        images: list[Any] = [None] * len(rows)
        for length in sorted({len(row) for row in rows}):
            members = [index for index, row in enumerate(rows) if len(row) == length]
            for first in range(0, len(members), IMAGES_PER_BATCH):
                chunk = members[first : first + IMAGES_PER_BATCH]
                batch = torch.stack([rows[index] for index in chunk]).to(model.device)
                with torch.inference_mode():
                    pixels = model.decode(batch)
                for index, image in zip(
                    chunk, self.image_processor.postprocess(pixels.float().cpu()), strict=True
                ):
                    images[index] = image
        return images

    def decode_beginning(self, codes: Sequence[Any]) -> Image.Image | None:
        """Show a picture of which only the first codes are known: a preview.

        Where the codes are nested, their prefix is a picture already. Elsewhere the missing codes
        are filled up with the commonest known one, and where codes have their place on a grid, the
        cells that are still to come are gray.

        Args:
            codes: the first codes of one picture, (L,) or (L, G); all of them will do too.

        Returns:
            The picture, or None where the codes are too few to show anything.

        Raises:
            CodeError: more codes than a picture has, or codes that the image tokenizer lacks.
        """
        config = self._require_model().config
        known = [tuple(code) if isinstance(code, list | tuple) else code for code in codes]
        if len(known) < (config.min_tokens if config.is_nested else 1):
            return None
        if config.is_nested or len(known) >= config.num_tokens:
            return self.decode_codes([known])[0]
        missing = config.num_tokens - len(known)
        commonest = Counter(known).most_common(1)[0][0]
        [image] = self.decode_codes([[*known, *[commonest] * missing]])
        if config.grid is not None:
            rows, columns = config.grid
            height, width = image.height // rows, image.width // columns
            for cell in range(len(known), config.num_tokens):
                left, top = cell % columns * width, cell // columns * height
                image.paste(NOT_YET, (left, top, left + width, top + height))
        return image

    def _require_model(self) -> ImageTokenizer:
        if self.vq_model is None:
            raise CheckpointError(
                "this processor was loaded without its image tokenizer, so pictures can neither be "
                "encoded nor decoded; load it without load_image_tokenizer=False"
            )
        return self.vq_model

    def _encoder(self) -> Any:
        if self.vq_model is None:
            return None
        return lambda sources: self.encode_images(sources).tolist()

    def _own_template(self) -> str | None:
        return self.chat_template if isinstance(self.chat_template, str) else None

    def _images_of(self, texts: list[str], images: Any) -> list[list[Any]]:
        """The codes of each text's pictures."""
        markers = [text.count(self.image_token) for text in texts]
        nested = isinstance(images, list | tuple) and images and isinstance(images[0], list | tuple)
        groups: list[list[Any]]
        if images is None:
            groups = [[] for _ in texts]
        elif nested:
            groups = [list(group) for group in images]
        elif len(texts) == 1:
            groups = [_flat(images)]
        else:
            flat = iter(_flat(images))
            wanted = markers if any(markers) else [1] * len(texts)
            groups = [list(islice(flat, number)) for number in wanted]
            groups[-1] += list(flat)
        for index, number in enumerate(markers):
            given = len(groups[index]) if index < len(groups) else 0
            if number != given and (number or len(groups) != len(texts)):
                raise MessageError(
                    f"text {index} has {number} markers {self.image_token} but {given} pictures; "
                    "expected as many pictures as markers"
                )
        flat_images = [image for group in groups for image in group]
        codes = iter(self.encode_images(flat_images).tolist() if flat_images else [])
        return [[next(codes) for _ in group] for group in groups]

    def _batch(
        self,
        rows: list[list[int]],
        labels: list[list[int]] | None,
        *,
        padding: bool | str,
        side: str,
        max_length: int | None,
        return_tensors: str | None,
    ) -> dict[str, list[list[int]]]:
        longest = max((len(row) for row in rows), default=0)
        if max_length is not None and longest > max_length:
            raise MessageError(
                f"a conversation of {longest} ids; expected at most max_length={max_length}: "
                "shorten it"
            )
        width = longest
        if padding == "max_length":
            if max_length is None:
                raise MessageError('padding="max_length" without max_length')
            width = max_length
        lengths = {len(row) for row in rows}
        if not padding and return_tensors and len(lengths) > 1:
            raise MessageError(
                f"rows of {min(lengths)} to {max(lengths)} ids cannot be one tensor; set "
                "padding=True"
            )
        pad_id = self.tokenizer.pad_token_id
        pad_id = pad_id if pad_id is not None else self.tokenizer.eos_token_id or 0

        def padded(row: list[int], value: int) -> list[int]:
            fill = [value] * (width - len(row)) if padding else []
            return fill + row if side == "left" else row + fill

        data = {
            "input_ids": [padded(row, pad_id) for row in rows],
            "attention_mask": [padded([1] * len(row), 0) for row in rows],
        }
        if labels is not None:
            data["labels"] = [padded(row, IGNORED) for row in labels]
        return data

    def __repr__(self) -> str:
        return f"{type(self).__name__} {self.to_json_string()}"

    # --- folder -----------------------------------------------------------------------------------

    def to_dict(self) -> dict[str, Any]:
        """What ``processor_config.json`` holds."""
        values = {
            "processor_class": type(self).__name__,
            "image_vocabulary": self.image_vocabulary,
            "caption_instruction": self.caption_instruction,
            "draw_instruction": self.draw_instruction,
            "draw_settings": self.draw_settings,
        }
        auto_map = getattr(self, "auto_map", None)
        return {**values, "auto_map": auto_map} if auto_map else values

    def save_pretrained(  # type: ignore[override]
        self, save_directory: str | os.PathLike[str], push_to_hub: bool = False, **kwargs: Any
    ) -> list[str]:
        """Write everything of a merged folder but the language model.

        That is the text tokenizer, ``processor_config.json``, ``image_tokenizer/`` and the source
        files for ``trust_remote_code``; without ``vq_model`` only the first two.

        Args:
            save_directory: made if it is missing; other files in it stay.
            push_to_hub: upload it as well; ``kwargs`` (repo_id, token, ...) go to ``push_to_hub``.
        """
        folder = Path(save_directory)
        folder.mkdir(parents=True, exist_ok=True)
        tokenizer = self.tokenizer
        if self._own_template() is not None:
            tokenizer.chat_template = self._own_template()
        tokenizer.save_pretrained(folder)
        if self.vq_model is not None:
            with atomic_folder(folder / IMAGE_TOKENIZER_FOLDER) as temporary:
                self.vq_model.save_pretrained(temporary)
                self.image_processor.save_pretrained(temporary)
                VocabularyExtension.from_image_tokenizer(self.vq_model).save(temporary)
        with atomic_write(folder / PROCESSOR_FILE) as temporary:
            temporary.write_text(self.to_json_string(), encoding="utf-8")
        if self.vq_model is not None:
            _write_code(folder)
        if push_to_hub:
            repo_id = kwargs.pop("repo_id", folder.name)
            self.push_to_hub(repo_id, **kwargs)
        return [str(folder / PROCESSOR_FILE)]

    @classmethod
    def from_pretrained(  # type: ignore[override]
        cls,
        pretrained_model_name_or_path: str | os.PathLike[str],
        *,
        load_image_tokenizer: bool = True,
        cache_dir: str | os.PathLike[str] | None = None,
        force_download: bool = False,
        local_files_only: bool = False,
        token: str | bool | None = None,
        revision: str | None = None,
        **kwargs: Any,
    ) -> "UnimodalProcessor":
        """Load the processor of a merged folder or hub id.

        Args:
            load_image_tokenizer: False leaves ``vq_model`` out; pictures then have to come as
                codes.
            kwargs: ``caption_instruction``, ``draw_instruction``, ``draw_settings`` or
                ``chat_template`` in place of the folder's. What AutoProcessor adds
                (``trust_remote_code``, ...) is ignored.

        Raises:
            CheckpointError: a folder that is missing, or holds no merged model.
            MismatchError: the image tokenizer or the text tokenizer is not the one that was merged.
        """
        folder = _local_folder(
            pretrained_model_name_or_path,
            cache_dir=cache_dir,
            force_download=force_download,
            local_files_only=local_files_only,
            token=token,
            revision=revision,
        )
        config = _read_config(folder)
        own = ("caption_instruction", "draw_instruction", "draw_settings", "chat_template")
        values = {key: config[key] for key in own if key in config}
        values |= {key: kwargs[key] for key in own if key in kwargs}
        sub_folder = folder / IMAGE_TOKENIZER_FOLDER
        if not sub_folder.is_dir():
            raise CheckpointError(
                f"{folder} has no {IMAGE_TOKENIZER_FOLDER} folder; expected a whole merged model: "
                "merge it again"
            )
        try:
            tokenizer = AutoTokenizer.from_pretrained(folder)
            image_processor = ImageTokenizerImageProcessor.from_pretrained(sub_folder)
        except (OSError, ValueError, KeyError) as error:
            raise CheckpointError(
                f"the tokenizer or image processor of {folder} cannot be loaded: {error}"
            ) from error
        processor = cls(
            image_processor,
            tokenizer,
            vq_model=ImageTokenizer.from_pretrained(sub_folder).eval()
            if load_image_tokenizer
            else None,
            image_vocabulary=config["image_vocabulary"],
            **values,
        )
        if "auto_map" in config:
            processor.__dict__["auto_map"] = config["auto_map"]
        return processor


def _write_code(folder: Path) -> None:
    """Put our sources into a saved folder, so that AutoProcessor finds its class anywhere."""
    if __package__ == "unimodal":
        add_remote_code(folder)
        return
    for source in Path(__file__).parent.glob("*.py"):  # we are such a copy: hand it on
        for target in (folder, folder / IMAGE_TOKENIZER_FOLDER):
            shutil.copy(source, target / source.name)


def _flat(images: Any) -> list[Any]:
    return list(images) if isinstance(images, list | tuple) else [images]


def _require_match(tokenizer: Any, vq_model: Any, vocabulary: ImageVocabulary) -> None:
    controls = zip(vocabulary.control_words(), vocabulary.control_token_ids, strict=True)
    for string, token_id in controls:
        found = tokenizer.convert_tokens_to_ids(string)
        if found != token_id:
            raise MismatchError(
                f"the text tokenizer gives {string} the id {found}; expected {token_id} as in the "
                "image vocabulary: use the tokenizer of the merged folder"
            )
    if vq_model is not None and vq_model.fingerprint() != vocabulary.fingerprint:
        raise MismatchError(
            f"the image tokenizer's fingerprint is {vq_model.fingerprint()[:12]}; the model was "
            f"merged with {vocabulary.fingerprint[:12]}, so its codes would mean other pictures: "
            "put back the image tokenizer of the merge, or merge again"
        )


def read_draw_settings(name_or_path: str | os.PathLike[str]) -> dict[str, Any]:
    """Return how a merged folder or hub id draws best, without loading it: see ``draw_settings``.

    Raises:
        CheckpointError: a folder that is missing, or holds no merged model.
    """
    return {**DRAW_DEFAULTS, **_read_config(_local_folder(name_or_path)).get("draw_settings", {})}


def _read_config(folder: Path) -> dict[str, Any]:
    path = folder / PROCESSOR_FILE
    if not path.is_file():
        raise CheckpointError(
            f"{folder} has no {PROCESSOR_FILE}; expected a folder that `unimodal merge` wrote"
        )
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise CheckpointError(f"{path} is no JSON ({error}); merge again") from error
    if not isinstance(config, dict) or "image_vocabulary" not in config:
        raise CheckpointError(
            f"{path} belongs to another processor; expected a folder that `unimodal merge` wrote"
        )
    return config


def _local_folder(name_or_path: str | os.PathLike[str], **hub: Any) -> Path:
    """The folder itself, or a snapshot of a hub repository without its language model."""
    path = Path(name_or_path)
    if path.is_dir():
        return path
    name = str(name_or_path)
    if path.is_absolute() or path.exists() or name.startswith(".") or name.count("/") != 1:
        raise CheckpointError(
            f"{name} is no folder; expected a folder that `unimodal merge` wrote, or a hub id "
            "owner/name"
        )
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    patterns = ["*.json", "*.jinja", "*.model", f"{IMAGE_TOKENIZER_FOLDER}/*"]
    try:
        return Path(snapshot_download(name, allow_patterns=patterns, **hub))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        raise CheckpointError(
            f"{name} is neither a folder here nor a repository that can be downloaded: "
            f"{str(error).splitlines()[0]}"
        ) from error
