"""The bundled model, the demo's prompts, and the demo itself."""

from pathlib import Path

MODEL = Path(__file__).parent / "model"
PROMPTS = Path(__file__).parent / "prompts.json"
HELDOUT = Path(__file__).parent / "heldout.jsonl"
