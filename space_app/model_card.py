"""Model cards of converted checkpoints."""

from modeling_chex import ChexConfig


HEADER = """---
library_name: transformers
pipeline_tag: zero-shot-object-detection
license: other
license_name: see-the-original-weights
tags:
- chex
- chest-x-ray
- radiology
- medical-imaging
---

"""

SAFETY = """## Intended use

Research on the interpretation of chest radiographs. **This is not a medical device.** It must not be used for
diagnosis, triage or any other clinical decision: outputs can be wrong in every respect, sentences can name findings
that are not in the image, and nothing here has been validated on patients of your institution.

## Licence

The conversion changes the file format, not the rights: the licence and the data use agreements of the original weights
apply to this folder as well. Official ChEX weights were trained on MIMIC-CXR, Chest ImaGenome and VinDr-CXR, which are
restricted to credentialed users; check their terms before you share the weights. The code that loads them is under
Apache-2.0.
"""

CITATION = """
## Citation

```bibtex
@inproceedings{mueller2024chex,
  title     = {ChEX: Interactive Localization and Region Description in Chest X-rays},
  author    = {M{\\"u}ller, Philip and Kaissis, Georgios and Rueckert, Daniel},
  booktitle = {European Conference on Computer Vision (ECCV)},
  year      = {2024}
}
```
"""


def official_card(
    config: ChexConfig, checkpoint: str, num_parameters: int, dtype: str, with_tokenizers: bool = True
) -> str:
    """README.md of a converted ChEX.

    Args:
        checkpoint: name of the official file.
        num_parameters: of all parts.
        dtype: of the weights.
        with_tokenizers: whether `ChexProcessor` can be loaded from the folder.
    """
    stage = 1 if config.post_decoder_config is None else 2 if config.generator_config is None else 3
    abilities = "locates what a text names and encodes regions"
    if stage == 3:
        abilities = "locates what a text names and describes regions in sentences"
    generate = ""
    if stage == 3:
        generate = """
sequences = model.generate(query_features=outputs.query_features, query_mask=outputs.query_mask)
answers = processor.post_process_explanation(outputs, sequences, inputs["original_sizes"], prompts=prompts)"""
    else:
        generate = """
answers = processor.post_process_explanation(outputs, None, inputs["original_sizes"], prompts=prompts)"""
    processor = 'ChexProcessor.from_pretrained("THIS_FOLDER")'
    note = ""
    if not with_tokenizers:
        extra = ", load_generator_tokenizer()" if stage == 3 else ""
        processor = f'ChexProcessor(ChexImageProcessor.from_pretrained("THIS_FOLDER"), load_clip_tokenizer(){extra})'
        note = (
            "\nThe folder was written without tokenizers. `load_clip_tokenizer` (`processing_chex.clip_tokenizer`)"
            + (" and `load_generator_tokenizer` (`processing_chex.generator_tokenizer`)" if stage == 3 else "")
            + " take them from the Hub.\n"
        )
    return f"""{HEADER}# ChEX, converted from `{checkpoint}`

ChEX ([Müller, Kaissis, Rueckert, ECCV 2024](https://arxiv.org/abs/2404.15770)) answers questions about chest
radiographs: it {abilities}. This folder holds the weights of an official
checkpoint of stage {stage}, {num_parameters:,} parameters in {dtype}, converted for Hugging Face Transformers.

## How to load

```python
from modeling_chex import ChexModel
from processing_chex import ChexImageProcessor, ChexProcessor

model = ChexModel.from_pretrained("THIS_FOLDER").eval()
processor = {processor}
prompts = ["Pleural effusion", "Right lower lung zone"]
inputs = processor(images="scan.png", text=prompts)
outputs = model(**inputs){generate}
```
{note}
Images are grey, cut to their central square and resized to {config.vision_config.image_size} pixels; boxes come back
as x0, y0, x1, y1 in pixels of the original image. `attention_mode` is `"legacy"`: with a query mask, as the processor
gives it, the answer to one prompt depends on the other prompts of the call, as in the official code. Set it to
`"grouped"` for independent answers, which the published weights were not evaluated with.

{SAFETY}{CITATION}"""


def chexzero_card(checkpoint: str, num_parameters: int, dtype: str) -> str:
    """README.md of encoders from a CLIP checkpoint; see `official_card`."""
    return f"""{HEADER}# Image and prompt encoder for ChEX, converted from `{checkpoint}`

The two encoders of a CLIP checkpoint such as CheXzero's (Tiu et al., *Nature Biomedical Engineering*, 2022),
{num_parameters:,} parameters in {dtype}, as the start of ChEX training. There is no prompt detector in it: stage 1
initialises and trains it.

## How to load

```bash
accelerate launch training/stage1.py init_from=THIS_FOLDER
accelerate launch training/pretrain_generator.py init_from=THIS_FOLDER
```

{SAFETY}{CITATION}"""


__all__ = ["chexzero_card", "official_card"]
