"""The emoji data set: what is one picture, what belongs together, what lands in which split."""

import json
import random
from pathlib import Path

import pytest
from PIL import Image, ImageFont, features

from eval.evaluate import EvaluationSettings
from eval.sheet import write_sheet
from tests.training.test_demo import TINY
from tokenizer_hf.configuration_image_tokenizer import ImageTokenizerConfig
from tokenizer_hf.errors import ConfigurationError, DataError
from training import emoji as module
from training.data.sources import Skipped, open_source, read_text
from training.demo import DemoRecipe, load_demo_recipe, run_demo
from training.emoji import (
    Emoji,
    base,
    draw_emoji,
    families,
    find_emoji,
    has_glyph,
    open_font,
    read_annotations,
    text_rows,
    write_emoji,
)
from training.image_tokenizer import TokenizerRecipe
from training.recipes import LanguageModelRecipe, TextModelRecipe, build_recipe

TONES = [chr(code) for code in range(0x1F3FB, 0x1F400)]
WORDS = {  # characters that the font in Pillow has, too
    "©": ("Copyright", "sign | mark"),
    "™": ("Trade Mark", "sign | mark"),
    "«": ("quote: left", "mark | quote"),
    "»": ("quote: right", "mark | quote"),
    "°": ("degree", "Angle | degree"),
    "±": ("plus-minus", "maths"),
    "…": ("ellipsis", "dots"),
    "a": ("letter a", "letter"),
    "漢": ("not in the font", "letter"),
}


@pytest.fixture(scope="module")
def font_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The font that comes with Pillow, as a file."""
    file = tmp_path_factory.mktemp("font") / "font.ttf"
    file.write_bytes(ImageFont.load_default(10).path.getvalue())
    return file


@pytest.fixture(scope="module")
def cldr(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """CLDR's two files with a few words."""
    common = tmp_path_factory.mktemp("cldr")
    rows = "".join(
        f'<annotation cp="{text}">{words}</annotation>'
        f'<annotation cp="{text}" type="tts">{name}</annotation>'
        for text, (name, words) in WORDS.items()
    )
    for folder, content in (("annotations", rows), ("annotationsDerived", "")):
        (common / folder).mkdir()
        text = f"<ldml><annotations>{content}</annotations></ldml>"
        (common / folder / "en.xml").write_text(text, encoding="utf-8")
    return common


@pytest.fixture(scope="module")
def folder(font_file: Path, cldr: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("data") / "emoji"
    write_emoji(out, font=font_file, cldr=cldr, validation=2, progress=False)
    return out


def metadata(folder: Path, split: str) -> list[dict]:
    lines = (folder / split / "metadata.jsonl").read_text(encoding="utf-8").splitlines()
    return [json.loads(line) for line in lines]


def test_annotations_are_read_in_lower_case_without_the_name(cldr: Path) -> None:
    found = read_annotations(cldr)
    assert found["™"] == ("trade mark", ("sign", "mark"))
    assert found["°"] == ("degree", ("angle",))


def test_only_characters_that_the_font_has(font_file: Path, cldr: Path) -> None:
    found = {one.text: one for one in find_emoji(open_font(font_file), read_annotations(cldr))}
    assert "©" in found and "…" in found
    assert "漢" not in found and "a" not in found  # no glyph; ASCII
    assert found["©"].captions == ["copyright", "copyright sign", "sign, mark"]
    assert found["°"].captions == ["degree", "degree sign", "angle"]


def test_sequences_that_fall_apart_are_no_picture(font_file: Path) -> None:
    font = open_font(font_file)
    assert has_glyph(font, "©") and not has_glyph(font, "©™")


def test_pictures_are_square_white_and_centred(font_file: Path) -> None:
    picture = draw_emoji(open_font(font_file), "©")
    assert picture.size == (64, 64) and picture.mode == "RGB"
    left, top, right, bottom = (
        picture.convert("L").point(lambda value: 255 * (value < 128)).getbbox()
    )
    assert abs(left - (64 - right)) <= 1 and abs(top - (64 - bottom)) <= 1
    assert right - left > 50
    assert picture.getpixel((0, 0)) == (255, 255, 255)


def test_variants_have_one_base() -> None:
    for running in ("🏃", "🏃🏽", "🏃🏿\u200d♀", "🏃\u200d♂\ufe0f"):
        assert base(running) == "🏃"
    assert base("👨🏼\u200d🚀") == base("👩\u200d🚀") == base("🧑\u200d🚀")
    assert base("👫") == base("🧑🏻\u200d🤝\u200d🧑🏿")
    assert base("👩\u200d🦰") == base("🧑")
    assert base("♀") == "♀" and base(TONES[0]) == TONES[0]  # alone they are emoji
    assert base("🇫🇷") != base("🇩🇪")


def test_families_hold_variants_equal_pictures_and_names_with_a_colon() -> None:
    rows = [
        ("💏", "kiss"),
        ("🏃🏽", "person running: medium skin tone"),
        ("👩\u200d❤\u200d👩", "kiss: woman, woman"),
        ("🇳🇴", "flag: norway"),
        ("🏃", "person running"),
        ("🇧🇻", "flag: bouvet island"),
        ("🇫🇷", "flag: france"),
    ]
    pictures = [b"0", b"1", b"2", b"no", b"4", b"no", b"fr"]
    groups = families([Emoji(text, (name,)) for text, name in rows], pictures)
    assert sorted(groups) == [[0, 2], [4, 1], [5, 3], [6]]


def test_one_skin_tone_of_an_emoji_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "has_glyph", lambda font, text: True)
    hands = ["👋", "🙌", "🤚", "🖖", "👌"]
    annotations = {
        hand + tone: (f"hand {i}: tone {j}", ())
        for i, hand in enumerate(hands)
        for j, tone in enumerate(["", *TONES])
    }
    found = {one.text for one in find_emoji(None, annotations)}  # type: ignore[arg-type]
    assert found >= set(hands)
    toned = [text for text in found if len(text) == 2]
    assert sorted(text[0] for text in toned) == sorted(hands)
    assert len({text[1] for text in toned}) > 1


def test_text_is_about_names_and_keywords() -> None:
    rows = text_rows(
        [Emoji("🍎", ("red apple",), ("fruit", "red")), Emoji("🍓", ("strawberry",), ("fruit",))],
        random.Random(0),
    )
    assert {"text": "red apple: fruit, red"} in rows
    chats = [[turn["content"] for turn in row["messages"]] for row in rows if "messages" in row]
    assert ["describe red apple", "fruit, red"] in chats and ["name fruit", "strawberry"] in chats
    (listed,) = [row["text"] for row in rows if row.get("text", "").startswith("fruit: ")]
    assert sorted(listed.removeprefix("fruit: ").split(", ")) == ["red apple", "strawberry"]
    assert not any(row.get("text", "").startswith("red: ") for row in rows)  # of one emoji only


def test_folder_reads_as_data_and_splits_share_nothing(folder: Path) -> None:
    manifest = json.loads((folder / "emoji.json").read_text())
    texts = {}
    for split in ("train", "validation"):
        rows = list(open_source(folder / split).read())
        assert not any(isinstance(row, Skipped) for row in rows)
        assert len(rows) == manifest[split] and all(row.captions for row in rows)
        lines = list(read_text([folder / "text" / f"{split}.jsonl"]))
        assert not any(isinstance(line, Skipped) for line in lines)
        texts[split] = lines
    assert manifest["validation"] == 2 and manifest["train"] >= 5 and manifest["cldr"]
    names = {s: {row["captions"][0] for row in metadata(folder, s)} for s in texts}
    assert not names["train"] & names["validation"]
    for held_out in names["validation"]:
        assert held_out not in str(texts["train"])
    pixels = {s: {f.read_bytes() for f in (folder / s).glob("*.png")} for s in texts}
    assert not pixels["train"] & pixels["validation"]
    quotes = [s for s in texts for row in metadata(folder, s) if row["emoji"] in "«»"]
    assert quotes in (["train", "train"], ["validation"])  # one family


def test_same_input_same_bytes_and_replaced_as_a_whole(
    folder: Path, font_file: Path, cldr: Path, tmp_path: Path
) -> None:
    again = tmp_path / "emoji"
    write_emoji(again, font=font_file, cldr=cldr, validation=2, progress=False)
    (again / "train" / "stale.png").touch()
    write_emoji(again, font=font_file, cldr=cldr, validation=2, progress=False)
    files = {path.relative_to(folder): path for path in folder.rglob("*") if path.is_file()}
    assert {p.relative_to(again) for p in again.rglob("*") if p.is_file()} == set(files)
    assert all((again / name).read_bytes() == path.read_bytes() for name, path in files.items())
    assert [path.name for path in tmp_path.iterdir()] == ["emoji"]


def test_without_cldr_there_are_unicode_names(
    font_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys
) -> None:
    monkeypatch.setattr(module, "CLDR", tmp_path / "nowhere")
    manifest = write_emoji(tmp_path / "emoji", font=font_file, validation=1, progress=False)
    assert "apt-get install unicode-cldr-core" in capsys.readouterr().err
    assert manifest["cldr"] is False
    rows = metadata(tmp_path / "emoji", "train") + metadata(tmp_path / "emoji", "validation")
    assert ["trade mark sign"] in [row["captions"] for row in rows]


def test_mistakes_are_told_and_leave_nothing(font_file: Path, cldr: Path, tmp_path: Path) -> None:
    out = tmp_path / "emoji"
    with pytest.raises(DataError, match="apt-get install fonts-noto-color-emoji"):
        write_emoji(out, font=tmp_path / "missing.ttf", cldr=cldr)
    (tmp_path / "text.ttf").write_text("not a font")
    with pytest.raises(DataError, match="cannot be opened"):
        write_emoji(out, font=tmp_path / "text.ttf", cldr=cldr)
    with pytest.raises(DataError, match="apt-get install unicode-cldr-core"):
        write_emoji(out, font=font_file, cldr=tmp_path)
    with pytest.raises(DataError, match="smaller --validation"):
        write_emoji(out, font=font_file, cldr=cldr, validation=5000, progress=False)
    with pytest.raises(ConfigurationError, match="at least 1"):
        write_emoji(out, font=font_file, cldr=cldr, validation=0)
    assert not out.exists()
    with pytest.raises(ConfigurationError, match="another --out"):
        write_emoji(tmp_path, font=font_file, cldr=cldr)  # holds something else
    assert (tmp_path / "text.ttf").exists()


def test_recipe_loads_and_names_what_the_command_writes(folder: Path) -> None:
    recipe = load_demo_recipe("emoji")
    assert recipe.shapes is None
    for name in [*recipe.pictures.values(), *recipe.text["train"], *recipe.text["validation"]]:
        assert (folder / Path(name).relative_to("data/emoji")).exists()


def test_every_block_of_the_recipe_is_one_of_its_command() -> None:
    recipe = load_demo_recipe("emoji")
    blocks: list[tuple[type, dict, dict]] = [
        (TokenizerRecipe, recipe.image_tokenizer, {"data": ["a"], "output_dir": "b"}),
        (TextModelRecipe, recipe.text_model, {"tokenizer": "a", "output_dir": "b"}),
        (LanguageModelRecipe, recipe.lora, {"model": "a", "output_dir": "b"}),
    ]
    for kind, block, given in blocks:
        build_recipe(kind, {**given, **block})  # raises for a field that nobody knows
    config = ImageTokenizerConfig(**recipe.image_tokenizer["tokenizer"])
    assert config.num_tokens == 64 and config.codebook_size == 1000
    EvaluationSettings(**recipe.evaluate)


def test_the_walk_in_miniature(
    folder: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Every stage over an imagefolder: no world, no parser."""
    recipe = build_recipe(
        DemoRecipe,
        {
            **{name: block for name, block in TINY.items() if name != "shapes"},
            "pictures": {s: str(folder / s) for s in ("train", "validation")},
            "text": {s: [str(folder / "text" / f"{s}.jsonl")] for s in ("train", "validation")},
            "text_tokenizer": {"vocab_size": 300},
            "evaluate": {"n": 2, "pictures": 2, "texts": 4},
            "draw": ["mark"],
        },
    )
    out = run_demo(recipe, tmp_path / "walk")
    report = json.loads((out / "report.json").read_text())
    assert report["world"] is None and "draw" not in report
    assert report["caption"]["exact"]["n"] == 2 and report["reconstruction"]["psnr"]["n"] == 2
    assert report["spans"] == {"generated": 2, "malformed": 0}
    assert report["retrieval"]["candidates"]["score"] == 2
    assert report["retrieval"]["own_likelihood"]["drawings"]["first"]["n"] == 2
    # The training pictures came, though these few share no words.
    assert "no word comes in the captions of 5 of" in caplog.text
    sheet = Image.open(write_sheet(out, tmp_path / "sheet.png"))
    assert sheet.width > 1000 and sheet.height > 500
    assert "<img" in (out / "report.html").read_text()


NOTO = next(iter(sorted(module.FONTS.rglob(module.FONT_FILE))), None)


@pytest.mark.skipif(
    NOTO is None or not (module.CLDR / "annotations").is_dir(),
    reason="needs `apt-get install fonts-noto-color-emoji unicode-cldr-core`",
)
def test_the_real_font_shows_colours_and_sequences() -> None:
    font = open_font()
    colours = draw_emoji(font, "🟥").getpixel((32, 32))
    assert isinstance(colours, tuple) and colours[0] > 150 > max(colours[1:])
    england = "🏴" + "".join(chr(0xE0000 + ord(letter)) for letter in "gbeng") + "\U000e007f"
    unshaped = ImageFont.truetype(font.path, 109, layout_engine=ImageFont.Layout.BASIC)
    assert not any(has_glyph(unshaped, text) for text in (england, "👋🏽", "🇫🇷"))
    if features.check("raqm"):
        assert all(has_glyph(font, text) for text in (england, "👋🏽", "🇫🇷"))
    assert has_glyph(font, "😀") and not has_glyph(font, "漢") and not has_glyph(font, "😀😀")
    assert read_annotations(module.CLDR)["😀"] == ("grinning face", ("face", "grin"))
