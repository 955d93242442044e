"""Trains nano's two tokenizers in the file formats of FLUX.1: CLIP's BPE and T5's SentencePiece unigram."""

import io
import json
import random
from collections import Counter
from pathlib import Path

from . import drawing

CLIP_MERGES = 256
T5_PIECES = 500
T5_LENGTH = 32  # tokens, padded with 0
CLIP_LENGTH = 77
FOLDED = {chr(c): chr(c + 32) for c in range(ord("A"), ord("Z") + 1)} | {"\t": " ", "\n": " ", "\u00a0": " "}


def corpus(count: int = 20_000) -> list[str]:
    """Captions; their words with mixed punctuation; and nonsense, so every letter and common pair gets a piece.

    SentencePiece needs the mixed lines: a word that the same character always follows never becomes a candidate.
    """
    rng = random.Random("corpus")
    captions = [drawing.caption(spec, rng) for spec, rng in drawing.specs(10, count, drawing.SHAPES, False)]
    common = Counter(word.strip(",") for line in captions for word in line.split())
    words = [word for word, uses in common.items() if uses > count / 200]
    mixed = ["".join(f"{rng.choice(words)}{rng.choice(',.!? -')} " for _ in range(6)) for _ in range(count // 8)]
    return captions + mixed + [" ".join(drawing.nonsense(rng) for _ in range(3)) for _ in range(count // 8)]


def train_clip(folder: Path, lines: list[str]) -> None:
    """Write vocab.json and merges.txt. Ids: bytes, bytes that end a word, merges, start, end (the highest id)."""
    from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE(end_of_word_suffix="</w>", continuing_subword_prefix=""))
    tokenizer.normalizer = normalizers.Lowercase()
    words = Regex(r"'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+")
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(words, behavior="removed", invert=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(
        vocab_size=2 * len(letters) + CLIP_MERGES, initial_alphabet=letters, end_of_word_suffix="</w>"
    )
    tokenizer.train_from_iterator(lines, trainer)
    merges = [tuple(pair) for pair in json.loads(tokenizer.to_str())["model"]["merges"]][:CLIP_MERGES]
    tokens = [*letters, *(f"{letter}</w>" for letter in letters), *("".join(pair) for pair in merges)]
    tokens = list(dict.fromkeys(tokens)) + ["<|startoftext|>", "<|endoftext|>"]
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "vocab.json").write_text(json.dumps({token: i for i, token in enumerate(tokens)}, ensure_ascii=False))
    (folder / "merges.txt").write_text("#version: 0.2\n" + "".join(f"{a} {b}\n" for a, b in merges))


def train_t5(folder: Path, lines: list[str]) -> None:
    """Write spiece.model: pad 0, </s> 1, <unk> 2.

    Its normalizer only lowercases A-Z and unifies white space: T5's own rule table alone would be 240 KB.
    """
    import sentencepiece

    folder.mkdir(parents=True, exist_ok=True)
    rules = Path("rules.tsv")  # a relative path, because it becomes part of the model file
    rules.write_text("".join(f"{ord(a):X}\t{ord(b):X}\n" for a, b in FOLDED.items()))
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(lines),
        model_writer=model,
        model_type="unigram",
        vocab_size=T5_PIECES,
        hard_vocab_limit=False,
        character_coverage=1.0,
        required_chars="abcdefghijklmnopqrstuvwxyz0123456789,.-'!?()",
        normalization_rule_tsv=str(rules),
        pad_id=0,
        eos_id=1,
        unk_id=2,
        bos_id=-1,
        minloglevel=2,
    )
    rules.unlink()
    (folder / "spiece.model").write_bytes(model.getvalue())


class Tokenizers:
    """Captions -> the two encoders' token ids, by the reference tokenizer of each file format."""

    def __init__(self, folder: Path):
        from sentencepiece import SentencePieceProcessor
        from transformers import CLIPTokenizer

        self.t5 = SentencePieceProcessor(model_file=str(folder / "tokenizer_2" / "spiece.model"))
        self.clip = CLIPTokenizer.from_pretrained(str(folder / "tokenizer"))

    def t5_ids(self, captions: list[str]) -> list[list[int]]:
        """T5_LENGTH ids each: pieces, </s>, then pad."""
        rows = [ids[: T5_LENGTH - 1] + [1] for ids in self.t5.encode(captions)]
        return [row + [0] * (T5_LENGTH - len(row)) for row in rows]

    def clip_ids(self, captions: list[str], length: int = CLIP_LENGTH) -> list[list[int]]:
        """`length` ids each: start, words, end, then more end tokens as padding."""
        return self.clip(captions, padding="max_length", truncation=True, max_length=length)["input_ids"]
