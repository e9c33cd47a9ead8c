"""Cut an assignment out of the project: the real files with bodies removed, what they need, and public tests.

Nothing is kept twice: solutions, docstrings, symbol tables and public tests are read from the project's own files.
"""
import ast
import re
import shutil
from dataclasses import dataclass, field
from pathlib import Path

from common.flags import UserError
from course.hidden import rubric

ROOT = Path(__file__).resolve().parent.parent


@dataclass(frozen=True)
class Assignment:
    title: str
    write: list[str]                        # modules with functions to write; a student hands in these files
    given: list[str] = field(default_factory=list)
    tests: dict[str, list[str]] = field(default_factory=dict)       # file of tests/ → public tests
    files: list[str] = field(default_factory=list)                  # copied as they are


# Module of a folder that is handed out → file of the project and, where only a part is needed, the names of that part.
MODULES = {
    "vista": ("methods/vista.py", []), "ce": ("methods/ce.py", []), "vdep": ("methods/vdep.py", []),
    "basic": ("methods/basic.py", []), "moca": ("methods/moca.py", []), "lora": ("methods/lora.py", []),
    "positions": ("common/positions.py", []), "text": ("common/text.py", []),
    "data": ("data.py", ["PLACEHOLDER", "IMAGE", "pieces", "encode", "Batch"]),
    "model": ("model.py", ["Projector", "DecoderLayer", "Llava", "rotary"]),
}
# What students write, in every folder; and private parts of a solution, which are left out.
STUBS = {
    "vista": ["alignment_loss"], "ce": ["next_token_loss"], "vdep": ["reconstruction_loss"],
    "basic": ["layer_weights", "supervision_degree", "direction_loss", "semantic_loss"],
    "moca": ["MoCa.__init__", "MoCa.forward"],
    "data": ["pieces", "encode", "Batch.text_after_image", "Batch.answer_tokens"],
    "model": ["Projector.forward", "rotary", "rotate", "Attention.forward", "Llava.merge", "DecoderLayer.forward"],
}
PRIVATE = {"ce": ["_ChunkedCrossEntropy"], "basic": ["_ChunkedDivergence"]}

ASSIGNMENTS = {
    "labels": Assignment("Labels and templates", ["data"], ["text"], {"test_labels.py": [
        "test_plain_is_the_image_and_the_caption", "test_vicuna_asks_and_answers",
        "test_every_label_is_the_id_at_its_place_and_the_answer_with_its_end_is_labelled",
        "test_an_image_that_does_not_fit_is_left_out_whole", "test_answers_see_the_image_only_after_it"]},
        ["toy/llm/tokenizer.json"]),
    "model": Assignment("Projector, merge and rotary attention", ["model"], ["moca", "lora", "positions"], {
        "test_attention.py": [
            "test_the_projector_is_gelu_between_two_maps", "test_a_quarter_turn_sends_the_first_half_to_the_second",
            "test_merging_puts_image_tokens_in_order_and_leaves_text",
            "test_the_first_pair_turns_by_the_position_itself",
            "test_attention_is_causal_and_of_equal_scores_the_mean"]}),
    "ce": Assignment("Cross-entropy in chunks, value and gradient", ["ce"], tests={"test_ce.py": [
        "test_the_first_label_has_nothing_to_be_predicted_from", "test_a_frozen_head_costs_no_gradient",
        "test_without_a_target_the_loss_is_zero_and_still_reaches_every_parameter",
        "test_unsupervised_positions_get_no_gradient", "test_bfloat16_is_summed_in_float32",
        "test_under_autocast_the_head_works_in_bfloat16_and_its_gradient_is_float32"]}),
    "vdep": Assignment("VDEP: the next image token is a target", ["vdep"], tests={"test_vdep.py": [
        "test_a_target_is_not_trained", "test_the_last_position_has_no_target_and_the_first_token_no_prediction",
        "test_predicting_the_next_token_exactly_costs_nothing", "test_the_ablations_pull_less_at_a_distance",
        "test_no_sample_in_this_mode_is_a_loss_of_zero", "test_an_unknown_option_is_refused"]}),
    "basic": Assignment("BASIC: shallow layers supervise the projector", ["basic"], tests={"test_basic.py": [
        "test_layers_weigh_as_the_square_of_their_depth", "test_a_patch_that_nobody_looks_at_adds_nothing",
        "test_gradients_reach_the_projectors_output_alone", "test_chunks_change_nothing",
        "test_the_divergence_is_zero_at_equality_and_positive_elsewhere", "test_direction_ignores_length_and_is_bounded",
        "test_it_is_the_targets_divergence_from_ours_and_not_the_other_way_round",
        "test_logits_too_large_for_exp_are_no_trouble", "test_a_batch_without_images_is_a_loss_of_zero_in_the_graph"]}),
    "vista": Assignment("VISTA: answers stay close to what was seen", ["vista"], tests={"test_vista.py": [
        "test_one_token_weighs_one_whatever_the_weighting", "test_later_tokens_weigh_more",
        "test_where_text_stands_in_the_sequence_does_not_matter_only_its_order",
        "test_text_that_is_what_was_seen_costs_nothing", "test_the_literal_sum_is_the_mean_times_the_width",
        "test_masked_positions_get_no_gradient_and_an_empty_batch_stays_in_the_graph"]}),
    "moca": Assignment("MoCa, and its place in the forward", ["moca", "model"], ["lora", "positions"], {
        "test_moca.py": ["test_it_is_an_affine_map_of_image_tokens_and_leaves_text_bit_for_bit"], "test_layer.py": [
            "test_a_layer_whose_mlp_gives_nothing_adds_attention_of_the_normed_input",
            "test_moca_calibrates_what_the_layer_returns_at_image_positions_alone",
            "test_attention_to_the_image_is_returned_only_if_somebody_asks"]}),
}


def definitions(tree: ast.Module) -> dict[str, ast.stmt]:
    """Top-level names of a module → the statement that defines them; imports are left out."""
    found = {}
    for node in tree.body:
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            found[node.name] = node
        elif isinstance(node, (ast.Assign, ast.AnnAssign)):
            for target in ast.walk(node.targets[0] if isinstance(node, ast.Assign) else node.target):
                if isinstance(target, ast.Name):
                    found[target.id] = node
    return found


def names_in(node: ast.AST) -> set[str]:
    """Names that a piece of code uses; the arguments of a function too, for they name fixtures in tests."""
    return {n.id for n in ast.walk(node) if isinstance(n, ast.Name)} | \
        {n.arg for n in ast.walk(node) if isinstance(n, ast.arg)}


def reachable(tree: ast.Module, wanted: list[str]) -> set[ast.stmt]:
    """The statements that define `wanted`, and all that these use."""
    defined, todo, kept = definitions(tree), list(wanted), set()
    while todo:
        name = todo.pop()
        if name in defined and defined[name] not in kept:
            kept.add(defined[name])
            todo += names_in(defined[name])
    missing = [name for name in wanted if name not in defined]
    if missing:
        raise UserError(f"the course's table names {', '.join(missing)}, which the file no longer defines: mend course/make.py")
    return kept


def first_line(node: ast.stmt) -> int:
    return min([node.lineno, *(d.lineno for d in getattr(node, "decorator_list", []))])


def cut(source: str, keep: list[str] = (), drop: list[str] = ()) -> str:
    """Source with only the definitions of `keep` and what they use (empty: all), without `drop`, and the imports that
    they all use. Comments above a definition stay with it."""
    tree = ast.parse(source)
    lines = source.splitlines()
    defined = definitions(tree)
    kept = reachable(tree, list(keep) or list(defined))
    used = set().union(*map(names_in, kept))
    kept -= {defined[name] for name in drop}
    out, end = [], 0
    for node in tree.body:
        start = first_line(node) - 1
        above, end = lines[end:start], node.end_lineno
        if isinstance(node, (ast.Import, ast.ImportFrom)):
            names = [a for a in node.names if (a.asname or a.name).split(".")[0] in used]
            if names:
                node.names = names
                out += [*[x for x in above if not x.strip()], ast.unparse(node)]
        elif node in kept or isinstance(node, ast.Expr):
            out += above + lines[start:end]
    return re.sub(r"\n{4,}", "\n\n\n", "\n".join(out).strip()) + "\n"


def flat(source: str) -> str:
    """Imports of the project's folders → imports of modules that lie side by side."""
    source = re.sub(r"^from (?:methods|common) import", "import", source, flags=re.M)
    return re.sub(r"^from (?:methods|common)\.(\w+) import", r"from \1 import", source, flags=re.M)


def stub(source: str, functions: list[str], task: str) -> str:
    """Replace what these functions do; signature and docstring stay."""
    lines = source.splitlines()
    found = {}
    for node in ast.parse(source).body:
        for inner in [node, *getattr(node, "body", [])]:
            if isinstance(inner, ast.FunctionDef):
                name = inner.name if inner is node else f"{node.name}.{inner.name}"
                found[name] = inner
    for name in sorted(set(functions) & set(found), key=lambda n: -found[n].lineno):
        node = found[name]
        start = node.body[0].end_lineno if ast.get_docstring(node) else node.body[0].lineno - 1
        while lines[start - 1].strip().startswith("#"):
            start -= 1
        lines[start:node.end_lineno] = [" " * (node.col_offset + 4) + f'raise NotImplementedError("{name} is yours to '
                                        f'write. Take your time: {task} explains it step by step.")']
    return "\n".join(lines) + "\n"


def module(name: str, source: str | None = None) -> str:
    """The text of a module with its solution, as it lies in a folder. source: another text of the project's file."""
    path, keep = MODULES[name]
    return flat(cut(source or (ROOT / path).read_text(), keep))


def handed_out(name: str) -> str:
    """The text of a module without anything that any assignment asks for."""
    return cut(stub(module(name), STUBS.get(name, []), "handout.md"), drop=PRIVATE.get(name, []))


def find(name: str) -> Assignment:
    if name not in ASSIGNMENTS:
        raise UserError(f"there is no assignment {name!r}: {', '.join(ASSIGNMENTS)} are there")
    return ASSIGNMENTS[name]


def make(name: str, out: Path) -> None:
    """Write one assignment to a new folder."""
    a = find(name)
    if out.exists():
        raise UserError(f"{out} is there already: give another --out, or remove it")
    out.mkdir(parents=True)
    for m in a.write + a.given:
        (out / f"{m}.py").write_text(handed_out(m))
    tests = []
    for path, names in a.tests.items():
        tests.append(cut((ROOT / "tests" / path).read_text(), names))
    (out / "test_public.py").write_text("\n\n".join(tests))
    adapters = set(re.findall(r"\w+", " ".join(re.findall(r"^from adapters import (.*)$", "\n".join(tests), re.M))))
    if adapters:
        (out / "adapters.py").write_text(flat(cut((ROOT / "tests/adapters.py").read_text(), sorted(adapters))))
    for path in a.files:
        shutil.copyfile(ROOT / path, out / Path(path).name)
    points = [f"| {item.__name__.replace('_', ' ')} | {item.points} |" for item in rubric(name)]
    (out / "handout.md").write_text((ROOT / "course/handouts" / f"{name}.md").read_text() + "\n".join([
        "\n## Points", "| hidden tests of | points |", "|---|---|", *points]) + "\n")
    hand_in = " ".join(f"{m}.py" for m in a.write)
    (out / "README.md").write_text(f"""# {a.title}
Read handout.md. Write the functions of {hand_in} that raise NotImplementedError; leave the other files as they are.

```sh
pip install torch pytest
pytest -q test_public.py
zip answer.zip {hand_in}
```

The first command installs what you need, the second runs the public tests, the third packs what you hand in.
""")


def capstone(out: Path) -> None:
    """The last assignment: the whole project, and a page."""
    out.mkdir(parents=True)
    shutil.copyfile(ROOT / "course/handouts/capstone.md", out / "handout.md")
