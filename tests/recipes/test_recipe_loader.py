from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from v4surgery.errors import RecipeError, UsageError
from v4surgery.recipes import dump_recipe, load_recipe, recipe_from_text

GOLDEN = Path(__file__).parent / "golden"


def problems_of(text: str, *overrides: str) -> list[str]:
    with pytest.raises(RecipeError) as caught:
        recipe_from_text(text, "r.yaml", overrides)
    return caught.value.problems


def write(folder: Path, **texts: str) -> None:
    for name, text in texts.items():
        (folder / f"{name}.yaml").write_text(text, encoding="utf-8")


def test_six_mistakes_are_six_lines_in_file_order(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(GOLDEN)
    with pytest.raises(RecipeError) as caught:
        load_recipe("six_mistakes.yaml")
    assert f"{caught.value}\n" == (GOLDEN / "six_mistakes.txt").read_text(encoding="utf-8")
    assert caught.value.exit_code == 2


@pytest.mark.parametrize(
    ("key", "meant"),
    [
        ("keep.hidden_sise", "hidden_size"),
        ("keep.experts.perToken", "per_token"),
        ("experts", "keep.experts"),
        ("head_dim", "keep.head_dim"),
        ("keep.n_routed_experts", "keep.experts"),
        ("keep.dtype", "store.dtype"),
        ("extend", "extends"),
    ],
)
def test_an_unknown_key_names_the_nearest_known_one(key: str, meant: str) -> None:
    (problem,) = problems_of("name: x", f"{key}=1")
    assert problem == f"--set {key}=1: {key}: unknown key; did you mean {meant}?"


def test_an_unknown_key_far_from_all_lists_the_known_ones() -> None:
    assert problems_of("name: x\nstore: {qqq: 1}") == [
        "r.yaml:2: store.qqq: unknown key; known here: dtype, layout, max_shard_size, nonfinite"
    ]


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("", "1: is empty; write at least `name: NAME`"),
        ("# only a comment\n", "1: is empty; write at least `name: NAME`"),
        ("- 1", "1: must be a mapping of keys to values (got [1])"),
        ("just text", "1: must be a mapping of keys to values (got 'just text')"),
        ("{}", "1: name: missing: short name of the replica: a-z, 0-9, '.', '_', '-'"),
        ("name: 12", "1: name: must be text; put it in quotes (got 12)"),
        ("name: x\nseed: 1.5", "2: seed: must be a whole number (got 1.5)"),
        ("name: x\nseed: -1", "2: seed: must be at least 0 (got -1)"),
        ("name: x\nseed: 0o17", "2: seed: must be a whole number (got '0o17')"),
        ("name: x\nseed: 12:30", "2: seed: must be a whole number (got '12:30')"),
        ("name: x\nseed: 1_000", "2: seed: must be a whole number (got '1_000')"),
        ("name: x\ncompensate: yes", "2: compensate: must be true or false (got 'yes')"),
        (
            "name: x\nconfig: {beta_fast: .nan}",
            "2: config.beta_fast: must be a finite number (got nan)",
        ),
        ("name: x\nkeep:\n  mtp: no", "3: keep.mtp: must be one of: keep, drop (got 'no')"),
        (
            "name: x\nkeep:\n  head_dim:\n    rope: 3",
            "4: keep.head_dim.rope: must be a multiple of 2 (got 3)",
        ),
        ("name: x\nname: y", "2: name: is given twice, first on line 1"),
        (
            "name: &a x\n",
            "1: name: a recipe takes no anchors or aliases; use extends (got &a)",
        ),
        (
            "name: x\nparent: *a\n",
            "2: parent: a recipe takes no anchors or aliases; use extends (got *a)",
        ),
        (
            "name: !!python/name:os.system x",
            "1: name: the tag !!python/name:os.system is not allowed; a recipe is plain YAML "
            "(got 'x')",
        ),
        (
            "name: x\nkeep: !!set {mtp}",
            "2: keep: this tag is not allowed; a recipe is plain YAML (got !!set)",
        ),
        ("name: x\n1: 2", "2: a key must be text (got 1)"),
        ("name: x\n[a]: 2", "2: a key must be text (got ['a'])"),
        ('name: x\n? {"\\e[31m": 1}', r"2: a key must be text (got {'\x1b[31m': 1})"),
        ("name: x\n<<: {seed: 1}", "2: '<<': unknown key; known here: name, description, parent"),
        ("name: x\n---\nname: y", "2: a second document starts; a recipe is one document"),
        ("name: x\nkeep:\n\tmtp: keep", "3: not valid YAML: a tab stands where only spaces"),
        ("name: x\nkeep: {mtp: keep", "2: not valid YAML: expected ',' or '}'"),
        ("name: x\n\0", r"2: character '\x00' is not allowed"),
        ('name: "\\ud800"', "1: name: half of a surrogate pair is no text (got '\\ud800')"),
        ('name: "\\UFFFFFFFF"', "1: not valid YAML: an escape or a version is out of range"),
        ("name: x\nseed: " + "9" * 5000, "2: seed: a number of more than 40 digits (got '999"),
        ("name: x\nkeep: " + "[" * 5000, "2: nested deeper than 32 levels"),
        ("name: x\nkeep: [" + "0," * 20_001 + "]", "2: more than 20000 values; a recipe is"),
        ("#" * 1_000_001, "1: is larger than 1000000 bytes; a recipe is smaller"),
    ],
)
def test_what_yaml_may_not_hold_is_one_problem_at_its_line(text: str, problem: str) -> None:
    (found,) = problems_of(text)
    assert found.startswith(f"r.yaml:{problem}")
    assert len(found) < 300


def test_values_in_messages_are_shortened() -> None:
    (problem,) = problems_of(f"name: x\nstore: {{dtype: {'b' * 500}}}")
    assert problem.endswith("(got '" + "b" * 56 + "...)")


def test_scalars_are_read_as_yaml_1_2() -> None:
    text = "name: on\nconfig: {beta_fast: 1e-5, beta_slow: 1.}\ndescription: 2026-01-01"
    recipe = recipe_from_text(text, "r.yaml")
    assert (recipe.name, recipe.description) == ("on", "2026-01-01")
    assert (recipe.config.beta_fast, recipe.config.beta_slow) == (1e-5, 1.0)


def test_core_tags_are_taken() -> None:
    text = "!!map {name: !!str 12, seed: !!int '3', config: {beta_fast: !!float 2}}"
    recipe = recipe_from_text(text, "r.yaml")
    assert (recipe.name, recipe.seed, recipe.config.beta_fast) == ("12", 3, 2.0)


def test_a_file_that_is_not_utf_8_names_line_and_byte(tmp_path: Path) -> None:
    (tmp_path / "r.yaml").write_bytes(b"name: x\ndescription: \xff\n")
    with pytest.raises(RecipeError, match=r"r\.yaml:2: is not UTF-8 text \(got byte 0xFF\)"):
        load_recipe(tmp_path / "r.yaml")


def test_a_file_may_start_with_a_byte_order_mark(tmp_path: Path) -> None:
    (tmp_path / "r.yaml").write_bytes(b"\xef\xbb\xbfname: x\n")
    assert load_recipe(tmp_path / "r.yaml").name == "x"


def test_an_unknown_builtin_names_the_nearest_and_the_next_command() -> None:
    with pytest.raises(UsageError) as caught:
        load_recipe("mini3")
    assert str(caught.value) == (
        "no built-in recipe has this name\n"
        "  value: 'mini3'\n"
        "  rule: did you mean mini3b, mini300m, mini1b?\n"
        "  next: `v4surgery recipes list` prints them; a file needs a path such as ./mini3"
    )


@pytest.mark.parametrize("path", ["./none.yaml", "none.yml", ".", "a\0b.yaml", "/"])
def test_a_file_that_cannot_be_read_is_a_usage_error(
    path: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UsageError):
        load_recipe(path)


def test_extends_merges_mappings_and_replaces_the_rest(tmp_path: Path) -> None:
    write(
        tmp_path,
        base="name: base\nseed: 3\nkeep:\n  experts: {keep: 8, by: gate, per_token: 2}\n"
        "  hidden_size: {keep: 128, by: norm}\n  q_lora_rank: [1, 2, 3]\n",
        child="extends: ./base.yaml\nname: child\nkeep:\n  experts: {keep: 4}\n"
        "  hidden_size: 64\n  q_lora_rank: [5]\n",
    )
    child = load_recipe(tmp_path / "child.yaml")
    assert (child.name, child.seed) == ("child", 3)
    assert child.keep.experts is not None and child.keep.hidden_size is not None
    assert (child.keep.experts.keep, child.keep.experts.by) == (4, "gate")
    assert (child.keep.hidden_size.keep, child.keep.hidden_size.by) == (64, "even")
    assert child.keep.q_lora_rank is not None and child.keep.q_lora_rank.ids == (5,)


def test_a_child_takes_a_key_back_with_null() -> None:
    recipe = recipe_from_text("extends: mini3b\nname: x\nkeep: {experts: null}", "r.yaml")
    assert recipe.keep.experts is None and recipe.keep.layers is not None


def test_problems_of_both_files_stand_at_their_own_lines(tmp_path: Path) -> None:
    write(
        tmp_path,
        base="name: base\nkeep:\n  hidden_size: 0\n  experts: {keep: 8, per_token: 2}\n",
        child="extends: base.yaml\n\nkeep:\n  experts:\n    keep: 1\nstor: 1\n",
    )
    with pytest.raises(RecipeError) as caught:
        load_recipe(tmp_path / "child.yaml")
    assert caught.value.problems == [
        f"{tmp_path}/child.yaml:6: stor: unknown key; did you mean store?",
        f"{tmp_path}/base.yaml:3: keep.hidden_size: must be at least 1 (got 0)",
        f"{tmp_path}/base.yaml:4: keep.experts.per_token: must be at most the number of kept "
        "experts, 1 (got 2)",
    ]


def test_extends_in_a_circle_is_an_error(tmp_path: Path) -> None:
    write(tmp_path, a="extends: b.yaml\nname: a", b=f"\nextends: ./../{tmp_path.name}/a.yaml")
    with pytest.raises(RecipeError, match=r"b\.yaml:2: extends: goes round in a circle"):
        load_recipe(tmp_path / "a.yaml")


@pytest.mark.parametrize("num_extended", [8, 9])
def test_extends_goes_through_eight_recipes(num_extended: int, tmp_path: Path) -> None:
    write(tmp_path, r0="name: x")
    for i in range(num_extended):
        write(tmp_path, **{f"r{i + 1}": f"extends: r{i}.yaml"})
    if num_extended == 8:
        assert load_recipe(tmp_path / "r8.yaml").name == "x"
    else:
        with pytest.raises(RecipeError, match=r"r1\.yaml:1: extends: goes through more than 8"):
            load_recipe(tmp_path / "r9.yaml")


@pytest.mark.parametrize(
    ("extends", "message"),
    [
        ("nino", "no built-in recipe has this name; did you mean nano?"),
        ("./none.yaml", "the recipe cannot be read: No such file or directory"),
        ("[nano]", "must be the name of a built-in recipe, or a path"),
    ],
)
def test_extends_of_nothing_points_at_its_line(extends: str, message: str) -> None:
    (problem,) = problems_of(f"name: x\nextends: {extends}")
    assert problem.startswith(f"r.yaml:2: extends: {message}")


def test_overrides_win_over_the_file_in_their_order() -> None:
    overrides = ("keep.experts.keep=12", "keep.experts.keep=10", "store={dtype: fp8}", "seed=1")
    recipe = load_recipe("mini3b", overrides)
    assert recipe.keep.experts is not None
    assert (recipe.keep.experts.keep, recipe.keep.experts.by) == (10, ("scores", "gate"))
    assert (recipe.store.dtype, recipe.store.max_shard_size, recipe.seed) == ("fp8", None, 1)


def test_an_override_reaches_into_a_short_form_and_makes_what_is_not_there() -> None:
    overrides = ("keep.hidden_size.by=norm", "config.beta_fast=1e1", "keep.vocab_size.keep=8")
    recipe = load_recipe("mini3b", overrides)
    assert recipe.keep.hidden_size is not None and recipe.keep.vocab_size is not None
    assert (recipe.keep.hidden_size.keep, recipe.keep.hidden_size.by) == (1536, "norm")
    assert (recipe.config.beta_fast, recipe.keep.vocab_size.keep) == (10.0, 8)


def test_an_empty_override_takes_a_key_back() -> None:
    assert load_recipe("mini3b", ["keep.experts="]).keep.experts is None


@pytest.mark.parametrize(
    ("override", "problem"),
    [
        ("keep.experts.keep=x", "keep.experts.keep: must be a whole number (got 'x')"),
        ("keep.experts.per_token=25", "keep.experts.per_token: must be at most the number of"),
        ("keep.experts", "must be dotted.key=value"),
        ("keep..experts=1", "must be dotted.key=value"),
        ("=1", "must be dotted.key=value"),
        ("a." * 40 + "a=1", "must be dotted.key=value"),
        ("extends=nano", "extends: stands in a file only; pass that file instead"),
        ("keep.mtp.x=1", "keep.mtp: there is no mapping to set a key in (got 'keep')"),
        ("seed=[1", "not valid YAML: expected ',' or ']'"),
        ("seed=&a 1", "a recipe takes no anchors or aliases; use extends (got &a)"),
        ("keep.sliding_windw=1", "keep.sliding_windw: unknown key; did you mean sliding_window?"),
    ],
)
def test_a_problem_of_an_override_names_it(override: str, problem: str) -> None:
    with pytest.raises(RecipeError) as caught:
        load_recipe("mini3b", [override])
    label = override if len(override) <= 60 else override[:57] + "..."
    (found,) = caught.value.problems
    assert found.startswith(f"--set {label}: {problem}")
    assert str(caught.value).startswith("built-in mini3b.yaml: 1 problem\n")


def test_dump_writes_short_forms_and_leaves_defaults_out() -> None:
    text = (
        "name: x\nkeep:\n  layers: {count: 4, by: kinds}\n  hidden_size: 64\n"
        "  experts: {per_token: 2}\n  heads:\n    groups: 2\n"
        "    per_group: {keep: 2, by: norm}\nvalidate: {logit_kl: 0.5}\n"
    )
    spelled_out = text + "seed: 0\nstore: {dtype: bf16, max_shard_size: null}\n"
    assert dump_recipe(recipe_from_text(spelled_out, "r.yaml")) == text


@pytest.mark.parametrize(
    "description",
    ["yes", "1e-5", "0o17", "089", "null", "", "a\nb\t ", " x", "é \x85\u2028\0", "1:2"],
)
def test_dump_quotes_what_would_be_read_as_something_else(description: str) -> None:
    recipe = recipe_from_text("name: x", "r.yaml").model_copy(update={"description": description})
    assert recipe_from_text(dump_recipe(recipe), "r.yaml") == recipe


def test_recipes_import_neither_torch_nor_numpy() -> None:
    code = "import sys, v4surgery.recipes; print({'torch', 'numpy'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"
