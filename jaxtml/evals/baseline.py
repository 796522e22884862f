"""The baseline of the judge, which is a speech recogniser.

The baseline is the judge's word errors on the recordings that the model's voice was trained on. A perfect voice would
get this figure in `own_voice_word_errors`. Called by `tools/evaluate.py`.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from jaxtml.data.bank import Bank
from jaxtml.evals.judge import Judge, count_errors
from jaxtml.evals.metrics import Metric, ratio
from jaxtml.strict_json import dumps

TRANSCRIPTS = "recordings.json"


def judge_baseline(judge: Judge, bank: Bank, texts: Sequence[str], out: Path) -> Metric:
    """Returns the judge's word errors on the bank's recordings of some texts.

    Args:
      judge: transcribes the recording of each text once; the transcripts are kept in `out`.
      bank: has the recordings. Texts without a recording are left out.
      texts: the texts that the model said in the evaluation.
      out: the folder of the evaluation.
    """
    path = out / TRANSCRIPTS
    transcripts: dict[str, str] = json.loads(path.read_text()) if path.exists() else {}
    recorded = [text for text in dict.fromkeys(texts) if text in bank.replies]
    for text in recorded:
        if text not in transcripts:
            transcripts[text] = judge.transcribe(bank.utterance(bank.replies[text]).wave)
    path.write_text(dumps(transcripts, indent=0))
    counts = [count_errors(text, transcripts[text]) for text in recorded]
    errors, words = sum(errors for errors, _ in counts), sum(words for _, words in counts)
    return ratio("recordings_word_errors", "own voice", errors, words, at_least=False)
