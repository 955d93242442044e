"""Image-to-text models of a few thousand random weights, saved as the hub has them. They say words from a list."""

from __future__ import annotations

from pathlib import Path

from helpers import Lazy, randomize
from tokenizers import Tokenizer, models, pre_tokenizers

transformers = Lazy("transformers")

WORDS = """
a red dog on green grass cat with hat sits under the old tree blue sky . , woman man holds cup coffee near window
"""
TEMPLATE = (
    "{% for m in messages %}user : {% for c in m.content %}{% if c.type == 'image' %}<image> {% else %}{{ c.text }} "
    "{% endif %}{% endfor %}{% endfor %}{% if add_generation_prompt %}assistant : {% endif %}"
)
SIDE = 32


def tokenizer(template: str | None = None):
    words = {word: i for i, word in enumerate(dict.fromkeys(WORDS.split()))}
    made = Tokenizer(models.WordLevel({**words, "<unk>": len(words)}, unk_token="<unk>"))
    made.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=made,
        bos_token="<s>",
        eos_token="</s>",
        pad_token="<pad>",
        unk_token="<unk>",
        extra_special_tokens={"image_token": "<image>"},
        chat_template=template,
    )


def florence2(folder: Path) -> Path:
    """A Florence-2: DaViT of two stages, BART of one layer each."""
    words = tokenizer()
    ids = dict(pad_token_id=words.pad_token_id, bos_token_id=words.bos_token_id, eos_token_id=words.eos_token_id)
    vision = dict(
        depths=(1, 1), patch_size=(7, 3), patch_stride=(4, 2), patch_padding=(3, 1), patch_prenorm=(False, True)
    )
    vision |= dict(
        embed_dim=(8, 16), num_heads=(2, 2), num_groups=(2, 2), window_size=4, projection_dim=16, drop_path_rate=0.0
    )
    text = dict(model_type="bart", vocab_size=len(words), d_model=16, max_position_embeddings=512, **ids)
    for side in ("encoder", "decoder"):
        text |= {f"{side}_layers": 1, f"{side}_attention_heads": 2, f"{side}_ffn_dim": 32}
    text |= dict(decoder_start_token_id=words.eos_token_id, forced_eos_token_id=words.eos_token_id)
    config = transformers.Florence2Config(
        text_config=text, vision_config=vision, image_token_id=words.image_token_id, **ids
    )
    images = transformers.CLIPImageProcessor(size={"height": SIDE, "width": SIDE}, do_center_crop=False)
    images.image_seq_length = (SIDE // 8) ** 2 + 1
    processor = transformers.Florence2Processor(images, words, post_processor_config={"pure_text": {}})
    return save(transformers.Florence2ForConditionalGeneration(config), processor, folder)


def llava(folder: Path, template: str | None = TEMPLATE) -> Path:
    """A LLaVA, asked by a chat template unless that is None: CLIP's vision of one layer, Llama of one."""
    words = tokenizer(template)
    sizes = dict(hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2)
    vision = dict(model_type="clip_vision_model", image_size=SIDE, patch_size=8, projection_dim=16, **sizes)
    ids = dict(pad_token_id=words.pad_token_id, bos_token_id=words.bos_token_id, eos_token_id=words.eos_token_id)
    text = dict(model_type="llama", vocab_size=len(words), num_key_value_heads=2, **sizes, **ids)
    config = transformers.LlavaConfig(
        text_config=text, vision_config=vision, image_token_index=words.image_token_id, vision_feature_layer=-1
    )
    images = transformers.CLIPImageProcessor(size={"shortest_edge": SIDE}, crop_size={"height": SIDE, "width": SIDE})
    processor = transformers.LlavaProcessor(
        images, words, patch_size=8, vision_feature_select_strategy="default", chat_template=template,
        num_additional_image_tokens=1,
    )  # fmt: skip
    return save(transformers.LlavaForConditionalGeneration(config), processor, folder)


def save(model, processor, folder: Path) -> Path:
    """Random weights like the padding more than words, which are all that is to be said."""
    words = processor.tokenizer
    silent = {*words.all_special_ids} - {words.eos_token_id}
    model.generation_config.update(suppress_tokens=sorted(silent), min_new_tokens=6, no_repeat_ngram_size=2)
    randomize(model).save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder
