"""The end of a toy run: MIR after each stage, accuracy on the test sets, a few answers."""
from pathlib import Path

import evaluate
import mir
from common.files import read_jsonl, write_json
from common.parallel import Ranks, choose_device
from evaluation.scores import own_row, table
from hub.checkpoint import checkpoints, load_model
from training.folder import Log


def report(out: Path, stages: list[str], device: str, dtype: str) -> None:
    """MIR after each stage, accuracy on the toy's test sets, a few answers; all of it in results.json too."""
    data, images = out / "data", out / "data" / "images"
    results = {"stages": {}, "mir": {}, "accuracy": {}, "shuffled": {}}
    steps = read_jsonl(out / "metrics.jsonl")
    where, kind = choose_device(device, dtype)
    for stage in stages:
        folder = checkpoints(out, stage)[-1]
        model = load_model(folder, dtype=kind, device=where)
        m = mir.measure(model, mir.pairs(folder, data / "val.jsonl", images, 100))
        losses = [line["ce"] for line in steps if line["stage"] == stage and "ce" in line]
        last = losses[-max(1, len(losses) // 10):]        # of samples that were not seen before, in one epoch
        results["stages"][stage] = {**m, "ce": sum(last) / len(last)}
        results["mir"][stage] = m["mir"]
    if "finetune" in stages:
        asked = evaluate.Config(ckpt=str(folder), overwrite=True, batch_size=256)
        reports = {r["name"]: r for r in evaluate.evaluate(asked, Ranks(0, 1, where, kind))}
        for name in ("test", "composition"):
            results["accuracy"][name] = own_row(reports[name])
            results["shuffled"][name] = own_row(reports[f"{name}, images shuffled"])
        rows = {"test": results["accuracy"]["test"], "unseen pairs": results["accuracy"]["composition"],
                "test, images shuffled": results["shuffled"]["test"]}
        print("\naccuracy, %\n" + table(rows) + "\n")
        answers = read_jsonl(out / "eval" / folder.name / "test" / "pred.jsonl")
        for r in answers[::len(answers) // 6 + 1]:        # six: one of every category, of different pictures
            verdict = "right" if r["score"] == 1 else r["answer"]
            print(f"{Path(r['image']).name}  {r['prompt']}  → {r['prediction']}  ({verdict})")
    print()
    for stage, m in results["stages"].items():
        print(f"after {stage:9} MIR {m['mir']:.3f}   CE {m['ce']:.3f}   |V| {m['V_norm']:.1f}   var V {m['V_var']:.0f}"
              f"   |text| {m['text_norm']:.1f}   |h| {m['h_norm']:.1f}")
    results["checkpoint"] = str(folder)
    write_json(out / "results.json", results)
    Log(out / "metrics.jsonl", "report", -1).write(stage="report", step=0, **results)
    print(f"checkpoint {folder}; all numbers in {out / 'results.json'}")
