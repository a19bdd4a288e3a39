"""The paper's comparison on a real language model: QAA, LoRA, SoRA, Prefix tuning and full fine-tuning, one protocol.

The files in the order of the work: :mod:`.config` (what to do), :mod:`.sources` and :mod:`.data` (model, examples),
:mod:`.models` (loading, frozen layers), :mod:`.methods` (what is trained), :mod:`.training` (how), :mod:`.metrics`,
:mod:`.run` (all of it, resumable), :mod:`.figures` and :mod:`.report` (what a reader sees).
"""
