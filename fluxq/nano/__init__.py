"""nano: FLUX.1-dev's architecture and file formats at toy size, with weights, so that everything runs on any machine.

`WEIGHTS` is the folder of the bundle (4.1 million weights in the flow model, 11 MB in all, bf16):

    flux1-nano.safetensors   the flow model: 2 double and 2 single blocks, 192 wide, 6 heads; guidance-distilled
    ae.safetensors           the autoencoder: 96 x 96 images become 16 x 12 x 12 latents
    clip_l.safetensors       CLIP's text model: 2 layers, 64 wide
    t5xxl.safetensors        T5's encoder: 2 layers, 128 wide, made for 32 tokens
    tokenizer/               CLIP's BPE: vocab.json, merges.txt
    tokenizer_2/             T5's SentencePiece: spiece.model

`drawing` draws the captioned images that nano was trained on, and a creature that it has never seen. `pretrain` makes
the weights. The bundled ones come from its stages, run in several sessions (autoencoder 11 minutes, flow 48,
distillation 12, on two CPU cores), so a new run gives similar weights, not the same. Sample at 96 x 96, guidance 3.5,
20 steps; train at guidance 1.
"""

from pathlib import Path

WEIGHTS: Path = Path(__file__).parent / "weights"
FLUX = WEIGHTS / "flux1-nano.safetensors"
AE = WEIGHTS / "ae.safetensors"
CLIP_L = WEIGHTS / "clip_l.safetensors"
T5XXL = WEIGHTS / "t5xxl.safetensors"
CLIP_TOKENIZER = WEIGHTS / "tokenizer"
T5_TOKENIZER = WEIGHTS / "tokenizer_2" / "spiece.model"

SIZE = 96  # pixels per side
T5_LENGTH = 32  # tokens per caption
