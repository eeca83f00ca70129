"""Model folders: diffusers opens ours and we open its, and both paint the same."""

import json
import logging
import shutil
import warnings
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from conditioning.open_clip import OpenClipEncoder
from ldm.schedule import Grid, VariancePreserving
from pipelines import TextToImagePipeline
from pipelines.folder import load_model, save_model, schedule_from
from pipelines.scheduler import grid_of, sampler_options
from tests.conftest import tiny_model
from train.build import open_autoencoder
from vae.autoencoder import Autoencoder

PROMPTS = ["a red circle on a blue background", "an oil painting of a fox"]


def pixels(image: Image.Image) -> np.ndarray:
    return np.asarray(image, np.float32)


@pytest.mark.parametrize("prediction", ["epsilon", "v", "sample"])
@pytest.mark.parametrize(
    ("sampler", "scheduler", "options"),
    [
        ("ddim", "DDIMScheduler", {}),
        ("dpmpp_2m", "DPMSolverMultistepScheduler", {}),
        ("euler", "EulerDiscreteScheduler", {}),
        ("heun", "HeunDiscreteScheduler", {}),
        ("ddpm", "DDPMScheduler", {"variance_type": "fixed_small"}),
        ("dpmpp_2m_sde", "DPMSolverMultistepScheduler", {"algorithm_type": "sde-dpmsolver++"}),
        ("unipc", "UniPCMultistepScheduler", {}),
        ("lms", "LMSDiscreteScheduler", {}),
        ("euler", "EulerDiscreteScheduler", {"final_sigmas_type": "sigma_min"}),
        ("ddim", "DDIMScheduler", {"timestep_spacing": "leading", "steps_offset": 0}),  # the pipeline makes it 1
    ],
)
def test_diffusers_opens_the_folder_and_paints_the_same(
    tmp_path: Path, sampler: str, scheduler: str, options: dict, prediction: str
) -> None:
    diffusers = pytest.importorskip("diffusers")
    model = tiny_model(prediction=prediction)
    model.scheduler |= options
    TextToImagePipeline(model).save_pretrained(tmp_path)
    ours = TextToImagePipeline.from_pretrained(tmp_path, device="cpu")
    theirs = diffusers.StableDiffusionPipeline.from_pretrained(tmp_path, safety_checker=None)
    theirs.set_progress_bar_config(disable=True)
    options = {key: value for key, value in options.items() if key != "steps_offset"}
    # from_config of another class would fill in its own defaults for what DDIM has and it has not.
    theirs.scheduler = getattr(diffusers, scheduler).from_config(
        theirs.scheduler.config, clip_sample=False, thresholding=False, **options
    )
    latents = torch.randn(2, 4, 4, 4, generator=torch.Generator().manual_seed(3))
    # A number that divides 1000: for others diffusers' DDIM takes steps of T // steps rows, off its own grid.
    call = {"num_inference_steps": 5, "guidance_scale": 3.0, "latents": latents}
    # diffusers multiplies the latents by its own initial sigma, in place of ours: both begin unit normal.
    got = ours(PROMPTS, sampler=sampler, generator=[torch.Generator().manual_seed(i) for i in range(2)], **call)
    wanted = theirs(PROMPTS, generator=[torch.Generator().manual_seed(i) for i in range(2)], **call)
    difference = np.mean([np.abs(pixels(a) - pixels(b)).mean() for a, b in zip(got.images, wanted.images, strict=True)])
    assert difference < 1.0  # of 255
    assert np.std([pixels(image) for image in got.images]) > 1.0  # not one flat grey, which would agree by itself


def test_a_folder_with_the_first_stable_diffusions_scheduler_paints_the_same_by_plms(tmp_path: Path) -> None:
    """Of epsilon, as they are: from v diffusers extrapolates what the network puts out, against the paper."""
    options = {"skip_prk_steps": True, "set_alpha_to_one": False, "timestep_spacing": "leading"}
    test_diffusers_opens_the_folder_and_paints_the_same(tmp_path, "plms", "PNDMScheduler", options, "epsilon")


def test_save_and_load_give_the_same_picture(model_folder: Path, tmp_path: Path) -> None:
    pipe = TextToImagePipeline.from_pretrained(model_folder, device="cpu")
    pipe.save_pretrained(tmp_path / "copy")
    again = TextToImagePipeline.from_pretrained(tmp_path / "copy", device="cpu")
    a, b = (p(PROMPTS[0], seed=5).images[0] for p in (pipe, again))
    assert (pixels(a) == pixels(b)).all()


def test_flow_model_is_kept_for_atelier_and_refused_to_diffusers(tmp_path: Path) -> None:
    model = tiny_model("flow", "velocity")
    with pytest.raises(ValueError, match="flow"):
        TextToImagePipeline(model).save_pretrained(tmp_path / "refused")
    assert not (tmp_path / "refused").exists()
    save_model(model, tmp_path / "kept")
    again = load_model(tmp_path / "kept")
    a, b = (TextToImagePipeline(m)(PROMPTS[0], seed=1, steps=3).images[0] for m in (model, again))
    assert (pixels(a) == pixels(b)).all()


@pytest.mark.parametrize(
    ("name", "config", "words"),
    [
        ("DEISMultistepScheduler", {}, ["_class_name='DEISMultistepScheduler': the sampler is dpmpp_2m"]),
        ("PNDMScheduler", {"skip_prk_steps": False, "prediction_type": "v_prediction"}, ["Heun's", "epsilon is extra"]),
        ("PNDMScheduler", {}, ["skip_prk_steps is missing, which is False to diffusers"]),
        (
            "UniPCMultistepScheduler",
            {"solver_order": 5, "disable_corrector": [0]},
            ["order=5", "r=[0]: every"],
        ),
        ("DPMSolverMultistepScheduler", {"algorithm_type": "sde-dpmsolver"}, ["algorithm_type='sde-dpmsolver'"]),
        ("DPMSolverMultistepScheduler", {"solver_order": 3, "solver_type": "heun"}, ["solver_order=3", "type='heun'"]),
        ("EulerDiscreteScheduler", {"use_beta_sigmas": True, "final_sigmas_type": "x"}, ["use_beta_sigmas", "at zero"]),
        ("DPMSolverMultistepScheduler", {"use_lu_lambdas": True, "use_flow_sigmas": True}, ["lu_lambdas", "flow"]),
        (
            "DDPMScheduler",
            {"variance_type": "learned_range"},
            ["variance_type='learned_range': the variance"],
        ),
        ("DDIMScheduler", {"clip_sample": True, "thresholding": True}, ["clip_sample=True", "thresholding=True"]),
        ("DDIMScheduler", {"clip_sample": ...}, ["clip_sample is missing"]),
    ],
)
def test_what_a_scheduler_config_asks_for_in_vain_is_said_once(
    tmp_path: Path, name: str, config: dict, words: list[str]
) -> None:
    model = tiny_model()
    model.scheduler |= {"_class_name": name, **config}
    model.scheduler = {key: value for key, value in model.scheduler.items() if value is not ...}
    save_model(model, tmp_path)
    with pytest.warns(UserWarning, match="scheduler config") as warned:
        pipe = TextToImagePipeline.from_pretrained(tmp_path, device="cpu")
    assert len(warned) == 1
    for word in words:
        assert word in str(warned[0].message)
    assert len(pipe(PROMPTS[0], steps=2).images) == 1  # and paints by any sampler


def test_what_a_scheduler_config_says_reaches_the_sampler() -> None:
    schedule = VariancePreserving.scaled_linear()
    for to_one, final in ((True, "zero"), (False, "sigma_min")):
        for sampler in ("ddim", "plms"):
            assert grid_of({"set_alpha_to_one": to_one}, schedule, sampler).final == final
    assert grid_of({}, schedule, "plms").final == "sigma_min"
    spaced = {"timestep_spacing": "trailing", "final_sigmas_type": "sigma_min", "use_karras_sigmas": True}
    for sampler in ("langevin", "predictor_corrector"):  # whose levels no scheduler of diffusers spaces
        assert grid_of(spaced, schedule, sampler) == Grid("exponential", offset=1)
        assert grid_of(spaced, schedule, sampler, "karras").spacing == "karras"
    for sampler in ("dpmpp_2m", "dpmpp_2m_sde", "unipc"):
        assert grid_of(spaced, schedule, sampler) == Grid("karras", offset=1, final="sigma_min")
    assert grid_of(spaced, schedule, "plms").spacing == "trailing"  # it knows no ramps
    config = {"_class_name": "UniPCMultistepScheduler", "solver_order": 3}
    assert sampler_options(config, "unipc", 0.0) == {"order": 3}
    assert sampler_options(config | {"solver_order": 5}, "unipc", 0.0) == {}
    assert sampler_options(config, "dpmpp_2m", 0.0) == {}


def test_the_large_variance_of_ddpm_is_the_folders_choice_or_the_calls(model_folder: Path) -> None:
    model = load_model(model_folder)
    call = {"sampler": "ddpm", "seed": 1, "output_type": "latent"}
    small = TextToImagePipeline(model)(PROMPTS[0], **call).images
    model.scheduler |= {"_class_name": "DDPMScheduler", "variance_type": "fixed_large"}
    large = TextToImagePipeline(model)(PROMPTS[0], **call).images
    assert not large.equal(small)
    assert TextToImagePipeline(model)(PROMPTS[0], variance="small", **call).images.equal(small)
    model.scheduler["variance_type"] = "fixed_small_log"
    assert TextToImagePipeline(model)(PROMPTS[0], **call).images.equal(small)
    assert TextToImagePipeline(model)(PROMPTS[0], variance="large", **call).images.equal(large)
    for wrong in ({"variance": "middling"}, {"variance": "small", "sampler": "ddim"}):
        with pytest.raises(ValueError, match="expected small or large, with sampler='ddpm'"):
            TextToImagePipeline(model)(PROMPTS[0], **(call | wrong))


@pytest.mark.parametrize(
    ("name", "options", "sampler"),
    [
        ("DDPM", {}, "ddpm"),
        ("DDIM", {}, "ddim"),
        ("EulerDiscrete", {}, "euler"),
        ("EulerAncestralDiscrete", {}, "euler_ancestral"),
        ("HeunDiscrete", {}, "heun"),
        ("DPMSolverMultistep", {}, "dpmpp_2m"),
        ("DPMSolverMultistep", {"algorithm_type": "sde-dpmsolver++"}, "dpmpp_2m_sde"),
        ("UniPCMultistep", {"solver_order": 3}, "unipc"),
        ("LMSDiscrete", {}, "lms"),
        ("PNDM", {"skip_prk_steps": True}, "plms"),
    ],
)
def test_complete_scheduler_configs_choose_their_sampler_and_give_no_warning(
    tmp_path: Path, name: str, options: dict, sampler: str
) -> None:
    diffusers = pytest.importorskip("diffusers")
    made = getattr(diffusers, f"{name}Scheduler")(beta_schedule="scaled_linear", steps_offset=1, **options)
    if "clip_sample" in made.config:
        made.register_to_config(clip_sample=False)
    model = tiny_model()
    model.scheduler = {**json.loads(made.to_json_string())}
    save_model(model, tmp_path)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        pipe = TextToImagePipeline.from_pretrained(tmp_path, device="cpu")
    call = {"seed": 1, "steps": 4, "output_type": "latent"}
    assert torch.equal(pipe(PROMPTS[0], **call).images, pipe(PROMPTS[0], sampler=sampler, **call).images)
    other = "ddim" if sampler == "dpmpp_2m" else "dpmpp_2m"
    assert not torch.equal(pipe(PROMPTS[0], **call).images, pipe(PROMPTS[0], sampler=other, **call).images)


def test_bad_folders_say_what_to_do(tmp_path: Path, model_folder: Path) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="no model folder"):
        TextToImagePipeline.from_pretrained(tmp_path / "empty")
    with pytest.raises(ValueError, match="not a model folder"):
        TextToImagePipeline.from_pretrained(tmp_path / "nothing")
    broken = tmp_path / "broken"
    save_model(load_model(model_folder), broken)
    weights = broken / "unet" / "diffusion_pytorch_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    with pytest.raises(ValueError, match=r"unet.*not complete"):
        TextToImagePipeline.from_pretrained(broken)
    weights.rename(weights.with_name("diffusion_pytorch_model.bin"))
    with pytest.raises(ValueError, match="pickled"):
        TextToImagePipeline.from_pretrained(broken)
    index = weights.with_name("diffusion_pytorch_model.safetensors.index.json")
    for said in ({}, {"weight_map": {"a": str(tmp_path / "elsewhere.safetensors")}}):
        index.write_text(json.dumps(said))
        with pytest.raises(ValueError, match=f"{index}: expected a weight_map that names files beside it"):
            TextToImagePipeline.from_pretrained(broken)
    with pytest.raises(ValueError, match="expected float32, bfloat16 or float16"):
        TextToImagePipeline.from_pretrained(model_folder, dtype="float8_e4m3fn")


@pytest.mark.parametrize(
    ("file", "value", "message"),
    [
        ("atelier.json", {"guidance_interval": 5}, "guidance_interval is 5, expected two noise levels, or null"),
        ("atelier.json", {"steps": "20"}, "steps is '20', expected a whole number"),
        ("atelier.json", {"sampler": "zzz"}, "sampler is 'zzz', expected one of"),
        ("atelier.json", {"conditioning": "labels"}, "KeyError: 'labels'"),
        ("atelier.json", {"conditioning": "smell"}, "conditioning is 'smell', expected one of clip, labels"),
        ("atelier.json", {"vae": "Identity"}, "channels is None, expected 1 or 3"),
        ("scheduler/scheduler_config.json", {"path": "flow"}, "KeyError: 'prediction'"),
        ("scheduler/scheduler_config.json", {"path": "edm"}, "KeyError: 'sigma_data'"),
        ("scheduler/scheduler_config.json", {"path": "spiral"}, "path='spiral' is not implemented"),
        ("scheduler/scheduler_config.json", {"beta_start": None}, "TypeError"),
        ("scheduler/scheduler_config.json", {"_class_name": 3}, "AttributeError"),
        ("unet/config.json", {"block_out_channels": 64}, "TypeError"),
        ("unet/config.json", {"norm_num_groups": 0}, "norm_num_groups|ZeroDivisionError"),
        ("unet/config.json", {"down_block_types": None}, "TypeError"),
        ("vae/config.json", {"latent_channels": -4}, "RuntimeError"),
        ("text_encoder/config.json", {"hidden_size": "32"}, "TypeError"),
    ],
)
def test_a_broken_config_is_named(tmp_path: Path, model_folder: Path, file: str, value: dict, message: str) -> None:
    shutil.copytree(model_folder, tmp_path / "broken")
    config = tmp_path / "broken" / file
    config.write_text(json.dumps(json.loads(config.read_text()) | value))
    with pytest.raises(ValueError, match=f"{config}.*(?:{message})"):
        load_model(tmp_path / "broken")


def test_other_broken_files_are_named(tmp_path: Path, model_folder: Path) -> None:
    folder = tmp_path / "broken"
    shutil.copytree(model_folder, folder)
    config = folder / "tokenizer" / "tokenizer_config.json"
    own = json.loads(config.read_text())
    for value, message in (
        ([1], f"{config}: expected a JSON object, got a list"),
        ({**own, "added_tokens_decoder": {"1": {}}}, f"{config.parent}: not a CLIP tokenizer"),
        ({**own, "added_tokens_decoder": [1]}, f"{config.parent}: not a CLIP tokenizer"),
        ({**own, "model_max_length": "x"}, f"{config.parent}: not a CLIP tokenizer"),
    ):
        config.write_text(json.dumps(value))
        with pytest.raises(ValueError, match=message):
            load_model(folder)
    model = load_model(model_folder)
    grey = Autoencoder(replace(model.vae.config, in_channels=1, out_channels=1))  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="takes 1 and puts out 1 channels of a picture: expected 3 and 3"):
        replace(model, vae=grey)


@pytest.mark.parametrize(
    "config",
    [
        {"_class_name": "FlowMatchEulerDiscreteScheduler", "shift": 3.0},
        {"_class_name": "EDMEulerScheduler", "sigma_data": 1.0, "prediction_type": "v_prediction"},
    ],
)
def test_levels_of_no_beta_table_are_refused(config: dict) -> None:
    with pytest.raises(ValueError, match=f"the scheduler {config['_class_name']} is not implemented"):
        schedule_from(config)


def test_half_precision_folder_opens_in_diffusers(tmp_path: Path, model_folder: Path) -> None:
    diffusers = pytest.importorskip("diffusers")
    TextToImagePipeline.from_pretrained(model_folder, device="cpu").save_pretrained(tmp_path, dtype=torch.float16)
    ours = TextToImagePipeline.from_pretrained(tmp_path, device="cpu")
    theirs = diffusers.StableDiffusionPipeline.from_pretrained(tmp_path, safety_checker=None)
    latents = torch.randn(1, 4, 4, 4, generator=torch.Generator().manual_seed(3))
    call = {"num_inference_steps": 3, "latents": latents}
    got = ours(PROMPTS[0], sampler="ddim", guidance_scale=7.5, **call).images[0]
    assert np.abs(pixels(got) - pixels(theirs(PROMPTS[0], **call).images[0])).mean() < 1.0


def test_variants_shards_and_what_diffusers_users_pass(
    model_folder: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    save_model(load_model(model_folder), tmp_path)
    for part, stem in (("unet", "diffusion_pytorch_model"), ("text_encoder", "model")):
        weights = load_file(tmp_path / part / f"{stem}.safetensors")
        half = {name: weight.half() for name, weight in weights.items()}
        save_file(half, tmp_path / part / f"{stem}.fp16.safetensors", metadata={"format": "pt"})
        names = sorted(weights)
        shards = {"a.safetensors": names[::2], "b.safetensors": names[1::2]}  # in place of the one file
        for file, held in shards.items():
            save_file({name: weights[name] for name in held}, tmp_path / part / file)
        weight_map = {name: file for file, held in shards.items() for name in held}
        (tmp_path / part / f"{stem}.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
        (tmp_path / part / f"{stem}.safetensors").unlink()
    original, sharded = load_model(model_folder), load_model(tmp_path)
    halves = load_model(tmp_path, variant="fp16")  # the autoencoder has no such files: its own are read
    for name in ("unet", "conditioner", "vae"):
        wanted, same, near = (getattr(m, name).state_dict() for m in (original, sharded, halves))
        assert all(wanted[key].equal(same[key]) for key in wanted)
        rounded = (lambda w: w.half().float()) if name != "vae" else (lambda w: w)
        assert all(rounded(wanted[key]).equal(near[key]) for key in wanted)
    with torch.no_grad():
        for part in (original.unet, original.conditioner.tower):
            next(part.parameters()).add_(1.0)
    for dtype in (None, torch.int8):  # saved over it, nothing of what lay there is read again
        over = tmp_path.with_name(f"over-{dtype}")
        shutil.copytree(tmp_path, over)
        save_model(original, over, dtype)
        for variant in (None, "fp16"):
            again = load_model(over, variant=variant)
            for name in ("unet", "conditioner"):
                wanted, same = (next(getattr(m, name).parameters()) for m in (original, again))
                torch.testing.assert_close(same, wanted, rtol=0.02, atol=0.02)
    with caplog.at_level(logging.INFO, "atelier"):
        TextToImagePipeline.from_pretrained(tmp_path, variant="fp16", use_safetensors=True, device="cpu")
    assert "on cpu, float32" in caplog.text
    for wrong in ({"variant": "bf16"}, {"use_safetensors": False}, {"attention": "xformers"}, {"attention": "flash"}):
        with pytest.raises(ValueError, match=next(iter(wrong))):
            TextToImagePipeline.from_pretrained(tmp_path, device="cpu", **wrong)  # type: ignore[arg-type]
    with pytest.raises(TypeError):
        TextToImagePipeline.from_pretrained(tmp_path, varient="fp16")  # type: ignore[call-arg]


@pytest.mark.parametrize("variant", [None, "fp16"])
def test_the_hub_gives_only_what_is_read(
    variant: str | None, model_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import huggingface_hub
    from huggingface_hub.utils import filter_repo_objects

    stems = {"unet": "diffusion_pytorch_model", "vae": "diffusion_pytorch_model", "text_encoder": "model"}
    endings = (".bin", ".safetensors", ".fp16.safetensors", ".non_ema.safetensors", ".non_ema.fp16.safetensors")
    files = [f"{part}/{stem}{ending}" for part, stem in stems.items() for ending in endings]
    codes = [f"{part}/diffusion_pytorch_model.safetensors" for part in ("semantic_encoder", "codes")]  # no variants
    files += codes
    fetched: list[str] = []

    def snapshot_download(hub_id: str, revision: str | None, allow_patterns: list, ignore_patterns: list) -> str:
        patterns = {"allow_patterns": allow_patterns, "ignore_patterns": ignore_patterns}
        fetched.extend(filter_repo_objects([*files, "model_index.json", "all.safetensors"], **patterns))
        return str(model_folder)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    pipe = TextToImagePipeline.from_pretrained("owner/name", variant=variant, revision="main", device="cpu")
    ending = f".{variant}.safetensors" if variant else ".safetensors"
    wanted = [f"{part}/{stem}{ending}" for part, stem in stems.items()]
    assert sorted(fetched) == sorted(["model_index.json", *codes, *wanted])
    assert pipe.source == "owner/name@main"


@pytest.mark.parametrize("alone", [True, False])
def test_the_hub_has_autoencoders(alone: bool, model_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of their own, or as a part of a model; of the rest nothing is fetched."""
    import huggingface_hub
    from huggingface_hub.utils import filter_repo_objects

    part = "" if alone else "vae/"
    wanted = [f"{part}config.json", f"{part}diffusion_pytorch_model.safetensors"]
    others = ["unet/diffusion_pytorch_model.safetensors", "README.md", wanted[1].replace(".safe", ".fp16.safe")]

    def snapshot_download(hub_id: str, revision: None, allow_patterns: list, ignore_patterns: list) -> str:
        assert hub_id == "owner/name"
        patterns = {"allow_patterns": allow_patterns, "ignore_patterns": ignore_patterns}
        assert list(filter_repo_objects([*wanted, *others, "diffusion_pytorch_model.bin"], **patterns)) == wanted
        return str(model_folder / "vae" if alone else model_folder)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    weights = open_autoencoder("owner/name").state_dict()
    for name, weight in load_model(model_folder).vae.state_dict().items():
        assert torch.equal(weights[name], weight)


def test_saved_files_can_be_read_by_whom_the_umask_lets(model_folder: Path) -> None:
    files = [*model_folder.rglob("*.safetensors")]
    assert len(files) == 3
    config = (model_folder / "unet" / "config.json").stat().st_mode
    assert {file.stat().st_mode for file in files} == {config}


def test_open_clip_paints_and_is_not_saved(tmp_path: Path) -> None:
    open_clip = pytest.importorskip("open_clip")
    text = {"context_length": 16, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 2}
    vision = {"image_size": 16, "layers": 1, "width": 16, "head_width": 8, "patch_size": 8}
    torch.manual_seed(1)
    clip = open_clip.CLIP(8, vision, text).eval().requires_grad_(False)
    model = tiny_model()
    model.conditioner = OpenClipEncoder(clip, open_clip.get_tokenizer("ViT-B-32"))
    pipe = TextToImagePipeline(model)
    fox, negative = (pixels(pipe("a fox " * 20, seed=1, negative_prompt=n).images[0]) for n in ("", "a boat"))
    assert fox.shape == (16, 16, 3)
    assert (fox != negative).any()
    with pytest.raises(ValueError, match="clip_skip"):
        pipe("a fox", clip_skip=1)
    with pytest.raises(ValueError, match="OpenClipEncoder"):
        save_model(model, tmp_path / "refused")
    assert not (tmp_path / "refused").exists()
