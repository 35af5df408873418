"""Causal language models of transformers that dsa does not run sparse, and why: the other half of the families' table.

`dsa.attach` and `dsa.accelerate` refuse in these words. Every name of transformers' list is either in a row of
`dsa.models.families` or here.
"""

from __future__ import annotations

_WHY = {
    "an encoder, which only a configuration makes a decoder, of a few hundred tokens": """
        bert bert-generation big_bird camembert data2vec-text electra ernie git megatron-bert rembert roberta
        roberta-prelayernorm roc_bert roformer xlm-roberta xlm-roberta-xl xmod
    """,
    "the decoder of an encoder-decoder": """
        bart bigbird_pegasus blenderbot blenderbot-small marian mbart musicgen musicgen_melody mvp pegasus plbart
        prophetnet trocr whisper
    """,
    "its attention does not go through transformers' attention interface": """
        codegen cpmant ctrl gpt_neo gpt_neox_japanese gptj openai-gpt xglm xlm xlnet
    """,
    "it adds a bias to its scores by distance (ALiBi), outside transformers' attention interface": "bloom falcon mpt",
    "it adds a learned bias to its scores by distance": "inkling_text inkling2_text",
    "it has no attention, only a state: there is nothing to select": "falcon_mamba mamba mamba2 rwkv xlstm",
    "none of its layers sees all earlier tokens: there is nothing to select": "moshi recurrent_gemma",
    "its attention buckets tokens by hashing": "reformer",
    "its layers hand no keyword arguments on to their attention, as sparse attention needs": "nemotron stablelm",
    "its layers attend twice each, so that an indexer would have two targets": "diffllama",
    "its layers make a mask of their own for each head": "doge",
    "it runs its layers several times in one pass, and reads prefixes in both directions": "hrm_text",
    "its attention lies in a module together with its norms": "dbrx",
    "its attention layers are one module that runs at several depths": "zamba zamba2",
    "its attention layers keep a state besides keys and values, in a cache of another kind": "falcon_h1 zaya",
    "its text is read as bytes, by three models in a row": "blt",
    "it amplifies rounding: on random weights transformers' eager and SDPA attention differ by 2e-2": "gemma3n_text",
    "its latent attention lies between layers of linear attention": "bailing_hybrid kimi_linear",
    "it reads the keys of another model": "gemma4_assistant gemma4_unified_assistant",
    "a model of text and images: dsa attaches to decoders of text, such as gemma3_text": "gemma3",
    "a model of text, images and sound: dsa attaches to decoders of text, such as gemma4_text": """
        gemma3n gemma4 gemma4_unified phi4_multimodal
    """,
    "a model of images or sound and text: dsa attaches to decoders of text, such as llama": """
        emu3 fuyu got_ocr2 moss_transcribe_diarize
    """,
    "its text layers also attend to images (cross-attention)": "mllama",
    "it compresses keys before it selects: another form than DeepSeek-V3.2's": "deepseek_v4",
    "its indexers select blocks, not tokens: another form than DeepSeek-V3.2's": """
        minimax_m3_vl_text qwen4_exp qwen4_exp_text
    """,
    "its queries and an output gate come out of one projection": "axk2",
    "it scales its latents, normalises the rotated key dims and gates its heads": "dots3_note dots3_note_text",
    "its indexers turn other dims, and its attention has sinks and a gate": "hy_v4",
    "its layers have two attentions each, and scale queries and latents": "longcat_flash",
    "it scales queries by position": "mistral4",
    "it shares latents between layers and scales queries by position": "mistral_large4_text",
}

REFUSED = {name: reason for reason, names in _WHY.items() for name in names.split()}
"""The reason by `model_type`, as it goes on after the model's name."""
