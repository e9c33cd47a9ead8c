"""The end of a toy run: MIR after each stage, accuracy on the test sets, a few answers."""
from pathlib import Path

import torch

import evaluate
import mir
from common.files import read_jsonl, write_json
from common.images import open_image
from common.parallel import Ranks
from evaluation.metrics import exact
from evaluation.scores import own_row, table
from hub.checkpoint import checkpoints, load_model
from hub.pairs import pair_batches, read_pairs
from look.gather import gather
from look.runs import write_report


def report(out: Path, stages: list[str], device: torch.device, dtype: torch.dtype) -> dict:
    """Print MIR after each stage, accuracy and a few answers; write them to results.json too."""
    results = {"stages": {}, "mir": {}, "accuracy": {}, "shuffled": {}}
    for stage in stages:
        folder = checkpoints(out, stage)[-1]
        results["stages"][stage] = measure_stage(out, stage, folder, device, dtype)
        results["mir"][stage] = results["stages"][stage]["mir"]
    if "finetune" in stages:
        ask_questions(out, folder, results, device, dtype)
    print()
    for stage, m in results["stages"].items():
        print(f"after {stage:9} MIR {m['mir']:.3f}   CE {m['ce']:.3f}   |V| {m['V_norm']:.1f}   var V {m['V_var']:.0f}"
              f"   |text| {m['text_norm']:.1f}   |h| {m['h_norm']:.1f}")
    results["checkpoint"] = str(folder)
    write_json(out / "results.json", results)
    print(f"checkpoint {folder}; all numbers in {out / 'results.json'}")
    answers, looks = [], []
    if "finetune" in stages:        # stage 1 has learned captions, and cannot be asked
        answers, looks = look_inside(out, folder, device, dtype)
    write_report(out, answers, looks)
    return results


def measure_stage(out: Path, stage: str, folder: Path, device, dtype) -> dict:
    """Return MIR on validation questions, and the cross-entropy of the last tenth of the steps."""
    model = load_model(folder, dtype=dtype, device=device)
    images = out / "data" / "images"
    pairs = read_pairs(out / "data" / "val.jsonl", images, 100)
    measured = mir.measure(model, pair_batches(folder, pairs, images))
    rows = read_jsonl(out / "metrics.jsonl")
    losses = [row["ce"] for row in rows if row["stage"] == stage and "ce" in row]
    last = losses[-max(1, len(losses) // 10):]
    return {**measured, "ce": sum(last) / len(last)}


def ask_questions(out: Path, folder: Path, results: dict, device, dtype) -> None:
    """Ask the test questions, also about shuffled images. Puts accuracies into `results`."""
    flags = evaluate.Config(ckpt=str(folder), overwrite=True, batch_size=256)
    reports = {r["name"]: r for r in evaluate.evaluate(flags, Ranks(0, 1, device, dtype))}
    for name in ("test", "composition"):
        results["accuracy"][name] = own_row(reports[name])
        results["shuffled"][name] = own_row(reports[f"{name}, images shuffled"])
    rows = {"test": results["accuracy"]["test"], "unseen pairs": results["accuracy"]["composition"],
            "test, images shuffled": results["shuffled"]["test"]}
    print("\naccuracy, %\n" + table(rows) + "\n")

    # Six answers: one of every category, about different pictures.
    answers = read_jsonl(out / "eval" / folder.name / "test" / "pred.jsonl")
    for r in answers[::len(answers) // 6 + 1]:
        verdict = "right" if r["score"] == 1 else r["answer"]
        print(f"{Path(r['image']).name}  {r['prompt']}  → {r['prediction']}  ({verdict})")


def look_inside(out: Path, folder: Path, device, dtype) -> tuple[list[dict], list[dict]]:
    """Gather what happens inside at a question of every category. Returns six answers, one look."""
    assistant = evaluate.Assistant.from_checkpoint(folder, device, dtype)
    rows, answers, looks = read_jsonl(out / "data" / "test.jsonl"), [], []
    for row in rows[::len(rows) // 6 + 1]:
        image = open_image(out / "data" / "images" / row["image"])
        look = gather(assistant, folder.name, image, row["text"], 16)
        right = exact(look["answer"], row["answer"])
        answers.append({**look, "wanted": row["answer"], "right": right})
        if row["category"] == "colour":
            looks = [look]
    return answers, looks
