"""Options for refining pretrained networks: what auto stands for, frozen BatchNorm, rates by layer, held encoders."""

import copy
import re
import shutil
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch
from torch import nn

from fgfast.cli.parse import parse_method
from fgfast.config import AUTO, flag, parse_values, validate, with_values
from fgfast.errors import UserError
from fgfast.methods.base import method_class
from fgfast.methods.mocov3 import MoCoV3Config
from fgfast.methods.refining import PLAIN, PRETRAINED, Refinement, refinement
from fgfast.methods.run_folder import load_network, load_run_encoder, read_run
from fgfast.methods.simclr import SimCLR, SimCLRConfig
from fgfast.methods.srgan import SRGAN
from fgfast.models.frozen import Frozen, freeze_batch_norm
from fgfast.models.stages import last_stages
from fgfast.run import load_checkpoint
from fgfast.train.groups import parameter_groups, set_rates
from fgfast.train.loop import pretrain
from fgfast.train.optim import make_optimizer
from fgfast.train.plan import plan_step
from tests.conftest import TINY
from tests.methods.common_checks import check_exact_resume
from tests.methods.method_cases import build
from tests.train.short_runs import simclr_config, statistics

CPU = torch.device("cpu")
OPTIONS = re.compile(rf"(?m)^({'|'.join(PLAIN._fields)}) = .*\n")


@pytest.fixture(scope="module")
def start(drawn: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A short run, whose weights and statistics others start from."""
    return pretrain("simclr", simclr_config(drawn, tmp_path_factory.mktemp("start") / "run", lr=1e-2))


def test_frozen_statistics_stay_and_the_weights_learn(drawn: Path, start: Path, tmp_path: Path) -> None:
    run = pretrain("simclr", simclr_config(drawn, tmp_path / "run", init=str(start), freeze_bn="on"))
    before, after = (load_run_encoder(folder, "last", CPU)[0].net for folder in (start, run))
    for name, value in statistics(before).items():
        assert torch.equal(statistics(after)[name], value), name
    assert not torch.equal(after.conv1[0].weight, before.conv1[0].weight)


def test_without_it_they_move(drawn: Path, start: Path, tmp_path: Path) -> None:
    run = pretrain("simclr", simclr_config(drawn, tmp_path / "run", init=str(start)))
    before, after = (statistics(load_run_encoder(folder, "last", CPU)[0].net) for folder in (start, run))
    assert not any(torch.equal(after[name], value) for name, value in before.items())


@pytest.fixture
def weights(start: Path, tmp_path: Path) -> Path:
    """The weights of the short run as a library without runs would store them."""
    file = tmp_path / "weights.pth"
    torch.save(load_run_encoder(start, "last", CPU)[0].net.state_dict(), file)
    return file


def test_weights_of_a_file_are_refined_by_default(drawn: Path, start: Path, weights: Path, tmp_path: Path) -> None:
    run = pretrain("simclr", simclr_config(drawn, tmp_path / "run", init=str(weights)))
    before, after = (statistics(load_run_encoder(folder, "last", CPU)[0].net) for folder in (start, run))
    assert all(torch.equal(after[name], value) for name, value in before.items())
    groups = load_checkpoint(run / "last.pt", "simclr")["optimizer"]["param_groups"]
    assert {group["scale"] for group in groups if group["encoder"]} == {0.05}
    line = (
        "so auto is --head-warmup 0.3 --encoder-rate 0.05 --freeze-bn on --color-strength 0.25 "
        "(as for random weights: --head-warmup 0.0 --encoder-rate 1.0 --freeze-bn off --color-strength 1.0)"
    )
    assert line in (run / "log.txt").read_text()
    pretrain("simclr", simclr_config(drawn, run, init=str(weights), epochs=3, resume=True))
    assert refinement(read_run(run)[1]) == PRETRAINED
    with pytest.raises(UserError, match=re.escape("--freeze-bn on, not off")):
        pretrain("simclr", simclr_config(drawn, run, init=str(weights), epochs=4, resume=True, freeze_bn="off"))


def test_views_follow_the_weights(drawn: Path, weights: Path, tmp_path: Path) -> None:
    auto, weak, strong = (
        SimCLR(simclr_config(drawn, tmp_path / "run", init=str(weights), **given)).normalised_views()
        for given in ({}, {"color_strength": 0.25}, {"color_strength": 1.0})
    )
    assert auto == weak != strong


def test_what_auto_stands_for_follows_the_weights(start: Path, weights: Path, tmp_path: Path) -> None:
    kept, untrained, other = (Path(shutil.copytree(start, tmp_path / name)) for name in ("kept", "untrained", "other"))
    text = (start / "config.toml").read_text()
    for before, after in (('freeze_bn = "off"', 'freeze_bn = "on"'), ("encoder_rate = 1.0", "encoder_rate = 0.2")):
        text = text.replace(before, after)
    (kept / "config.toml").write_text(text)
    for name in ("last.pt", "previous.pt", "encoder.safetensors"):
        (untrained / name).unlink(missing_ok=True)
    (other / "config.toml").write_text("of = 'another program'")
    shutil.copy(weights, kept / "imagenet.pth")
    computed, of_run = PRETRAINED._replace(freeze_bn="off"), PLAIN._replace(freeze_bn="on", encoder_rate=0.2)
    given = {"freeze_bn": "off", "encoder_rate": 0.5, "head_warmup": 0.0, "color_strength": 0.0}
    cases = [
        ({}, PLAIN),
        ({"init": "timm"}, PRETRAINED),
        ({"init": str(weights)}, PRETRAINED),
        ({"init": str(weights), "sync_bn": True}, computed),
        ({"init": str(weights), "clean_stats": 10}, computed),
        ({"init": str(weights), "preset": "paper"}, PLAIN),
        ({"init": str(weights), **given}, Refinement(**given)),
        ({"init": str(start)}, PLAIN),
        ({"init": str(start / "encoder.safetensors")}, PLAIN),
        ({"init": str(untrained / "init.pt")}, PLAIN),
        ({"init": str(kept / "imagenet.pth")}, PRETRAINED),
        ({"init": str(other)}, PRETRAINED),
        ({"init": str(kept)}, of_run),
        ({"init": str(kept / "last.pt")}, of_run),
        ({"init": str(kept), "sync_bn": True}, of_run._replace(freeze_bn="off")),
    ]
    for options, expected in cases:
        assert refinement(SimCLRConfig(**options)) == expected, options


def test_a_planned_step_is_refined_too() -> None:
    """Without an encoder whose BatchNorms keep their statistics, a batch in chunks would be refused."""
    config = SimCLRConfig(model=TINY, size=32, batch_size=8, device="cpu", amp="off", init="timm", micro_batch=4)
    assert plan_step(SimCLR, config).most["parameters"] > 0
    with pytest.raises(UserError, match="BatchNorm"):
        plan_step(SimCLR, replace(config, freeze_bn="off"))


def test_options_of_a_refined_run_serve_other_weights_with_auto(drawn: Path, weights: Path, tmp_path: Path) -> None:
    run = pretrain("simclr", simclr_config(drawn, tmp_path / "run", init=str(weights)), train=False)
    words = ["simclr", "--config", str(run / "config.toml"), "--init", "none", "--out", str(tmp_path / "other")]
    config = parse_method(words)[1]
    with pytest.raises(UserError, match=re.escape("give --init, or --freeze-bn off.")):
        validate(config)
    config = parse_method(words + [word for name in Refinement._fields for word in (flag(name), AUTO)])[1]
    validate(config)
    assert refinement(config) == PLAIN


@pytest.mark.parametrize(("lines", "kept"), [("", "off"), ("freeze_bn = false\n", "off"), ("freeze_bn = true\n", "on")])
def test_runs_of_earlier_versions_are_as_they_were(start: Path, tmp_path: Path, lines: str, kept: str) -> None:
    """They knew no auto, and --freeze-bn was a switch."""
    run = Path(shutil.copytree(start, tmp_path / "run"))
    text = (run / "config.toml").read_text().replace('init = "none"', 'init = "timm"')
    rest = OPTIONS.sub("", text)
    assert len(rest.splitlines()) == len(text.splitlines()) - len(PLAIN)
    (run / "config.toml").write_text(lines + rest)
    assert refinement(read_run(run)[1]) == PLAIN._replace(freeze_bn=kept)


def test_an_earlier_run_is_resumed_as_it_began(drawn: Path, weights: Path, tmp_path: Path) -> None:
    given = {"init": str(weights), **PLAIN._asdict()}
    run = pretrain("simclr", simclr_config(drawn, tmp_path / "run", epochs=1, **given))
    whole = pretrain("simclr", simclr_config(drawn, tmp_path / "whole", epochs=2, **given))
    text = (run / "config.toml").read_text()
    (run / "config.toml").write_text(OPTIONS.sub("", text))
    pretrain("simclr", simclr_config(drawn, run, epochs=2, init=str(weights), resume=True))
    groups = load_checkpoint(run / "last.pt", "simclr")["optimizer"]["param_groups"]
    assert len(groups) == 2
    assert not any("scale" in group for group in groups)
    assert refinement(read_run(run)[1]) == refinement(read_run(whole)[1]) == PLAIN


def test_an_encoder_without_a_run_is_not_refined(weights: Path) -> None:
    config = SimCLRConfig(model=TINY, size=32, init=str(weights))
    assert not any(isinstance(module, Frozen) for module in load_network(config, CPU)[0].modules())


def test_words_of_a_text_are_options(drawn: Path) -> None:
    config = simclr_config(drawn, Path("out"))
    texts = {"freeze_bn": "false", "encoder_rate": "auto"}, {"freeze-bn": "on", "encoder_rate": "0.5"}
    found = [parse_values(config, text, "--set") for text in texts]
    assert [[*values.values()] for values in found] == [[False, "auto"], ["on", 0.5]]
    assert [with_values(config, values, "--set").freeze_bn for values in found] == ["off", "on"]
    for text, message in (({"freeze_bn": "yess"}, "choose one of auto, on, off"), ({"encoder_rate": "x"}, "or auto")):
        with pytest.raises(UserError, match=message):
            parse_values(config, text, "--set")


@pytest.mark.parametrize("kind", [nn.BatchNorm1d, partial(nn.BatchNorm1d, affine=False)])
def test_a_frozen_norm_is_that_of_evaluation(kind: type[nn.Module]) -> None:
    norm, x = kind(3), torch.randn(5, 3)
    norm(x)
    expected = copy.deepcopy(norm).eval()(x)
    frozen = freeze_batch_norm(norm).train()
    assert torch.equal(frozen(x), expected)
    assert torch.equal(copy.deepcopy(frozen).train()(x), expected)
    assert [*frozen.state_dict()] == [*kind(3).state_dict()]


def test_a_norm_without_statistics_is_left_alone() -> None:
    norm = freeze_batch_norm(nn.BatchNorm1d(2, track_running_stats=False))
    assert type(norm) is nn.BatchNorm1d


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"freeze_bn": "on"}, "--freeze-bn on keeps the statistics of initial weights"),
        ({"freeze_bn": "on", "init": "x", "sync_bn": True}, "--sync-bn"),
        ({"freeze_bn": "on", "init": "x", "clean_stats": 10}, "--clean-stats"),
        ({"clean_stats": 1}, "--clean-stats is 1, and one image has no variance: give 2 or more, or leave it out."),
        ({"layer_decay": 0.0}, "--layer-decay is 0.0"),
        ({"encoder_rate": 0.0}, "--encoder-rate is 0.0"),
        ({"encoder_rate": "slow"}, "--encoder-rate is 'slow': give a value of type float, or auto."),
        ({"freeze_bn": True}, "--freeze-bn is True: choose one of auto, on, off."),
        ({"average": 1.0}, "--average is 1.0"),
        ({"head_warmup": 1.5}, "--head-warmup is 1.5"),
    ],
)
def test_options_that_contradict_each_other_are_refused(options: dict[str, object], message: str) -> None:
    with pytest.raises(UserError, match=re.escape(message)):
        validate(replace(SimCLRConfig(data="d", out="o"), **options))


def test_rates_fall_with_the_depth_of_the_layer() -> None:
    config = SimCLRConfig(model=TINY, size=32, hidden=16, projection=8, layer_decay=0.5, lr=1.0, warmup=0.0)
    method = method_class("simclr")(config)
    optimizer = make_optimizer(method, config)
    set_rates(optimizer, config, 0, 10)
    rates = {id(p): group["lr"] for group in optimizer.param_groups for p in group["params"]}
    net = method.encoder.net
    stages = [rates[id(next(stage.parameters()))] for stage in (net.conv1, net.layer1, net.layer2, net.layer3)]
    assert stages == sorted(set(stages))
    assert rates[id(next(method.projector.parameters()))] == 1.0
    assert len(rates) == len(list(method.parameters()))


@pytest.mark.parametrize("decay", [1.0, 0.5])
def test_the_encoder_has_a_rate_of_its_own(decay: float) -> None:
    config = SimCLRConfig(model=TINY, size=32, hidden=16, projection=8, layer_decay=decay, lr=1.0, warmup=0.0)
    rates = []
    for ratio in (1.0, 0.1):
        chosen = replace(config, encoder_rate=ratio)
        method = method_class("simclr")(chosen)
        optimizer = make_optimizer(method, chosen)
        set_rates(optimizer, chosen, 0, 10)
        found = {id(p): group["lr"] for group in optimizer.param_groups for p in group["params"]}
        rates.append({name: found[id(p)] for name, p in method.named_parameters()})
    plain, slower = rates
    for name, rate in plain.items():
        assert slower[name] == pytest.approx(0.1 * rate if name.startswith("encoder.") else rate), name


def test_by_default_there_are_the_two_groups_of_earlier_checkpoints() -> None:
    config = SimCLRConfig(model=TINY, size=32, hidden=16, projection=8)
    groups = parameter_groups(method_class("simclr")(config), config)
    assert [set(group) for group in groups] == [{"params", "weight_decay"}] * 2


def test_the_encoder_is_held_while_the_heads_warm_up(drawn: Path, tmp_path: Path) -> None:
    config = simclr_config(drawn, tmp_path / "run", epochs=2, head_warmup=0.5, weight_decay=0.1)
    pretrain("simclr", replace(config, epochs=2, out=str(tmp_path / "whole")))
    states = [load_checkpoint(tmp_path / "whole" / f"{name}.pt", "simclr")["method"] for name in ("init", "last")]
    weight = "encoder.net.conv1.0.weight"
    assert not torch.equal(states[0][weight], states[1][weight])
    method = method_class("simclr")(config)
    optimizer = make_optimizer(method, config)
    for step, held in ((0, True), (4, True), (5, False)):
        set_rates(optimizer, config, step, 10)
        of_encoder = {group["lr"] for group in optimizer.param_groups if group["encoder"]}
        of_heads = {group["lr"] for group in optimizer.param_groups if not group["encoder"]}
        assert (of_encoder == {0.0}) == held
        assert min(of_heads) > 0


def test_srgan_freezes_its_encoder_and_has_no_average() -> None:
    config = build("srgan").config
    norms = [
        m for m in SRGAN(replace(config, freeze_bn="on")).train().encoder.modules() if isinstance(m, nn.BatchNorm2d)
    ]
    assert norms
    assert not any(norm.training for norm in norms)
    with pytest.raises(UserError, match="leave --average out"):
        SRGAN(replace(config, average=0.9))


@pytest.mark.parametrize(
    "options", [{"average": 0.9}, {"clean_stats": 12}, {"layer_decay": 0.7, "head_warmup": 0.3, "average": 0.5}]
)
def test_a_resumed_refinement_equals_an_uninterrupted_one(
    drawn: Path, tmp_path: Path, options: dict[str, float]
) -> None:
    resumed = check_exact_resume("simclr", simclr_config(drawn, tmp_path, **options), tmp_path, stop_after=4)
    runs = (load_checkpoint(folder / "last.pt", "simclr") for folder in (resumed, tmp_path / "uninterrupted"))
    one, other = (run.get("average", {}) for run in runs)
    torch.testing.assert_close(one, other, rtol=0, atol=0)


@pytest.mark.parametrize("options", [{"average": 0.9}, {"layer_decay": 0.7}])
def test_other_options_of_refinement_on_resume_are_refused(
    drawn: Path, tmp_path: Path, options: dict[str, float]
) -> None:
    run = pretrain("simclr", simclr_config(drawn, tmp_path / "run"))
    with pytest.raises(UserError, match=re.escape("config.toml")):
        pretrain("simclr", simclr_config(drawn, run, resume=True, epochs=3, **options))


@pytest.mark.parametrize("stages", ["1", "2"])
def test_held_stages_stay_and_the_last_learn(stages: str, drawn: Path, start: Path, tmp_path: Path) -> None:
    run = pretrain("simclr", simclr_config(drawn, tmp_path / "run", init=str(start), stages=stages))
    before, after = (load_run_encoder(folder, "last", CPU)[0] for folder in (start, run))
    learning = last_stages(before, stages)
    assert 0 < len(learning) < len([*before.net.named_parameters()])
    for name, value in before.net.named_parameters():
        assert torch.equal(after.net.get_parameter(name), value) == (name not in learning), name
    for name, value in statistics(before.net).items():
        inside = any(other.startswith(name.rpartition(".")[0] + ".") for other in learning)
        assert torch.equal(statistics(after.net)[name], value) != inside, name


def test_held_stages_have_no_backward_pass(start: Path, drawn: Path, tmp_path: Path) -> None:
    config = simclr_config(drawn, tmp_path / "run", init=str(start), stages="1")
    method = method_class("simclr")(config)
    inputs = []
    method.encoder.net.layer1.register_forward_hook(lambda module, given, out: inputs.append(out.requires_grad))
    method.encoder.train()(torch.randn(2, 3, 32, 32))
    assert inputs == [False]
    assert not method.encoder.net.layer1.training
    assert method.encoder.net.layer4.training
    copied = copy.deepcopy(method.encoder).train()
    assert not copied.net.layer1.training


def test_stages_need_weights_and_exist(drawn: Path, start: Path, tmp_path: Path) -> None:
    config = simclr_config(drawn, tmp_path / "run", stages="1")
    with pytest.raises(UserError, match="--stages keeps the initial weights"):
        validate(config)
    with pytest.raises(UserError, match=r"--stages is 9: .* has 4 stages"):
        method_class("simclr")(replace(config, init=str(start), stages="9"))
    with pytest.raises(UserError, match="--stages is x"):
        method_class("simclr")(replace(config, init=str(start), stages="x"))


def test_weaker_colour_changes() -> None:
    half, full, none = (
        method_class("mocov3")(MoCoV3Config(model=TINY, color_strength=strength)).normalised_views().crops
        for strength in (0.5, 1.0, 0.0)
    )
    assert any(crop.solarize for crop in full)
    for weak, strong in zip(half, full, strict=True):
        assert weak.jitter == pytest.approx([s / 2 for s in strong.jitter])
        assert (weak.grayscale, weak.solarize) == pytest.approx((strong.grayscale / 2, strong.solarize / 2))
        assert (weak.blur, weak.scale, weak.jitter_p) == (strong.blur, strong.scale, strong.jitter_p)
    assert all(crop.jitter == (0, 0, 0, 0) and crop.grayscale == crop.solarize == 0 for crop in none)
