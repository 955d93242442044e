"""An image-to-text model of transformers: images -> captions.

Any model that AutoModelForImageTextToText knows: Florence-2, told by its task what to write; models with a chat
template, asked by a prompt (Qwen-VL, Gemma, LLaVA ...); others, for which the prompt, if any, is the text beside the
image (BLIP, PaliGemma). Only code of transformers runs, never a repository's own, and only safetensors are read.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from PIL import Image

from fluxq.console import Notify, quiet_imports
from fluxq.data.caption_edits import shortened, whole_sentences
from fluxq.errors import WrongRequest, is_out_of_memory, one_line
from fluxq.models.hub import folder_from_hub, hub_id

DEFAULT_MODEL = "florence-community/Florence-2-base"
DEFAULT_TASK = "<MORE_DETAILED_CAPTION>"
DEFAULT_PROMPT = "Describe in one paragraph what this image shows. Answer with the description only."
MAX_TOKENS = 256
"""Of a caption, unless --max-words allows more."""
T5_TOKENS = 512
"""What training reads of a caption at most."""

_WEIGHTS = re.compile(r"model(-\d+-of-\d+)?\.safetensors|model\.safetensors\.index\.json")
_PROCESSOR = ("processor_config.json", "preprocessor_config.json")
_TOKENIZER = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt", "spiece.model")


class Captioner:
    """Called with RGB images, it returns the caption of each.

    model: a folder, or an id on the hub. prompt: what to ask; for Florence-2 one of its tasks. max_words: shorten
    captions to whole sentences of at most so many words. Raises WrongRequest for a model that cannot be used.
    """

    def __init__(
        self,
        model: str,
        prompt: str | None = None,
        max_words: int | None = None,
        offline: bool = False,
        notify: Notify = print,
    ) -> None:
        self.name, self.max_words = model, max_words
        folder = _folder_of(Path(model), offline, notify)
        self.kind = _kind_of(folder, model)
        self._load(folder)
        self.prompt = self._checked(prompt)
        self._asks = self.kind != "florence2" and bool(getattr(self.processor, "chat_template", None))
        if self._asks and prompt is None:
            self.prompt = DEFAULT_PROMPT + (f" Use at most {max_words} words." if max_words else "")
        self.max_tokens = min(3 * max_words + 16, T5_TOKENS) if max_words else MAX_TOKENS

    def __call__(self, images: Sequence[Image.Image]) -> list[str]:
        """Raises WrongRequest if the model has no answer to that prompt, and torch's errors if memory runs out."""
        import torch

        with quiet_imports(), torch.inference_mode():
            try:
                inputs = self._inputs(images).to(self.model.device, self.model.dtype)
                rows = self.model.generate(**inputs, max_new_tokens=self.max_tokens, do_sample=False)
            except (ValueError, TypeError, KeyError, AttributeError, ImportError) as error:
                raise WrongRequest(
                    f"{self.name} cannot be asked for a caption with {self._prompt_in_words()} ({_reason(error)}); "
                    "give another --prompt or --model"
                ) from error
        asked = inputs.get("input_ids")
        if asked is not None and torch.equal(rows[:, : asked.shape[1]], asked):
            rows = rows[:, asked.shape[1] :]  # what the model adds to a prompt
        tokenizer = getattr(self.processor, "tokenizer", self.processor)
        texts = tokenizer.batch_decode(rows, skip_special_tokens=True)
        filler = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
        return [self._finished(text, int((row != filler).sum())) for text, row in zip(texts, rows, strict=True)]

    def _load(self, folder: Path) -> None:
        import torch

        with quiet_imports():
            import transformers
            from transformers import dynamic_module_utils

            dynamic_module_utils.TIME_OUT_REMOTE_CODE = 0  # refuse to run a repository's code, and do not ask
            transformers.utils.logging.disable_progress_bar()
            device = "cuda" if torch.cuda.is_available() else "cpu"
            half = (
                torch.bfloat16
                if device == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
                else torch.float16
            )
            try:
                self.processor: Any = transformers.AutoProcessor.from_pretrained(folder, local_files_only=True)
                loaded: Any = transformers.AutoModelForImageTextToText.from_pretrained(
                    folder,
                    local_files_only=True,
                    use_safetensors=True,
                    output_loading_info=True,
                    dtype=half if device == "cuda" else torch.float32,
                )
                model, found = loaded
                self.model: Any = model.to(device).eval()
            except Exception as error:  # transformers raises almost any type for files that do not fit together
                if is_out_of_memory(error):
                    raise WrongRequest(
                        f"{self.name} does not fit into the GPU's memory; name a smaller --model, close other "
                        "programs, or hide the GPU with CUDA_VISIBLE_DEVICES=-1"
                    ) from error
                raise WrongRequest(
                    f"{self.name} cannot be loaded by transformers {transformers.__version__} ({_reason(error)}); name "
                    f"another --model, such as {DEFAULT_MODEL}"
                ) from error
        if missing := sorted(found["missing_keys"]):
            raise WrongRequest(
                f"{self.name} lacks {len(missing):,} of the weights that transformers' {self.kind} has ({missing[0]}), "
                "so its captions would be noise; it may be meant for code of its own, which fluxq does not run; name "
                f"another --model, such as {DEFAULT_MODEL}"
            )
        if tokenizer := getattr(self.processor, "tokenizer", None):
            tokenizer.padding_side = "right" if self.model.config.is_encoder_decoder else "left"

    def _checked(self, prompt: str | None) -> str | None:
        """The prompt; of Florence-2 a task that is answered with text."""
        if self.kind != "florence2":
            return prompt
        answers = self.processor.tasks_answer_post_processing_type
        tasks = [task for task in self.processor.task_prompts_without_inputs if answers[task] == "pure_text"]
        if prompt is None or prompt in tasks or not any(task in prompt for task in answers):
            return prompt or DEFAULT_TASK  # other prompts are for finetunes
        raise WrongRequest(f"--prompt {prompt} is not answered with a text by Florence-2; use {' or '.join(tasks)}")

    def _inputs(self, images: Sequence[Image.Image]) -> Any:
        shared = {"return_tensors": "pt", "padding": True}
        if not self._asks:
            text = {"text": [self.prompt] * len(images)} if self.prompt is not None else {}
            return self.processor(images=list(images), **text, **shared)
        talks = [
            [{"role": "user", "content": [{"type": "image", "image": image}, {"type": "text", "text": self.prompt}]}]
            for image in images
        ]
        return self.processor.apply_chat_template(
            talks, add_generation_prompt=True, tokenize=True, return_dict=True, processor_kwargs=shared
        )

    def _prompt_in_words(self) -> str:
        return "no prompt" if self.prompt is None else f"the prompt {self.prompt!r}"

    def _finished(self, text: str, tokens: int) -> str:
        text = " ".join(text.split())
        if tokens >= self.max_tokens:  # it was stopped there
            text = whole_sentences(text)
        return shortened(text, self.max_words) if self.max_words else text


def _folder_of(model: Path, offline: bool, notify: Notify) -> Path:
    model = model.expanduser()
    if repository := hub_id(model):
        folder = folder_from_hub(repository, _is_wanted, _is_complete, notify, offline)
    elif not model.is_dir():
        problem = "is a file" if model.exists() else "does not exist"
        raise WrongRequest(f"--model {model} {problem}; name the folder of an image-to-text model, or a hub id")
    else:
        folder = model
    if not (folder / "config.json").is_file():
        raise WrongRequest(f"{model} has no config.json, so it is not a model for transformers; name another --model")
    if not any(_WEIGHTS.fullmatch(file.name) for file in folder.iterdir()):
        raise WrongRequest(
            f"{model} has no weights in model.safetensors; other files can run hidden code: name another"
        )
    return folder


def _is_wanted(name: str) -> bool:
    """Whether a file of a repository is needed: not its code, nor weights in other forms."""
    return bool(_WEIGHTS.fullmatch(name) or re.fullmatch(r"[^/]+\.(json|txt|jinja|model)", name))


def _is_complete(folder: Path) -> bool:
    """Whether a download of `folder` has ended."""
    names = {file.name for file in folder.iterdir()}
    try:
        index = json.loads((folder / "model.safetensors.index.json").read_text(encoding="utf-8"))
        weights = set(index["weight_map"].values())
    except FileNotFoundError:
        weights = {"model.safetensors"}
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return False
    return "config.json" in names and weights <= names and all(names & {*f} for f in (_PROCESSOR, _TOKENIZER))


def _kind_of(folder: Path, name: str) -> str:
    """The model's type, like "florence2". Raises WrongRequest if transformers has no such image-to-text model."""
    with quiet_imports():
        import transformers
        from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES as kinds
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        kind = config["model_type"]
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise WrongRequest(f"{name} has no model_type in its config.json; name another --model") from error
    if not isinstance(kind, str) or kind not in kinds:
        raise WrongRequest(
            f"{name} is a {one_line(str(kind))[:40]}, which is not an image-to-text model of transformers "
            f"{transformers.__version__}; name another --model, such as {DEFAULT_MODEL}"
        )
    return kind


def _reason(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0][:200]
