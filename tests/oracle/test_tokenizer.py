"""Token ids against the `tokenizers` library: the same tokenizer.json, 10,000 generated strings each.

Characters are as old as Unicode 12: the library's NFC tables stop there, its regular expressions know Unicode 16, and
PCRE2 and utf8proc are as new as the system's.
"""

import json
import os
import pathlib
import random
import subprocess
import unicodedata

import pytest
from safetensors.torch import load_file
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

from reference_models import bundled_model

PROGRAM = os.environ["PRISMAQUANT_BINARY"]
STRINGS = 10_000
GPT4 = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
QWEN = GPT4.replace(r"\p{N}{1,3}", r"\p{N}")

LETTERS = [(0x41, 0x5A), (0x61, 0x7A), (0xC0, 0x24F), (0x370, 0x3FF), (0x400, 0x4FF), (0x5D0, 0x5EA), (0x620, 0x64A),
           (0x904, 0x939), (0xE01, 0xE2E), (0x1E00, 0x1EFF), (0x2C00, 0x2C5F), (0xA4D0, 0xA4F7), (0x10400, 0x1044F)]
MARKS = [(0x300, 0x36F), (0x483, 0x489), (0x591, 0x5BD), (0x64B, 0x65F), (0x93E, 0x94D), (0xE31, 0xE31), (0xE34, 0xE3A),
         (0x1AB0, 0x1ABE), (0x20D0, 0x20F0), (0x3099, 0x309A)]
DIGITS = [(0x30, 0x39), (0x660, 0x669), (0x966, 0x96F), (0xFF10, 0xFF19), (0xB2, 0xB3), (0xBC, 0xBE), (0x2160, 0x2188)]
IDEOGRAPHS = [(0x3041, 0x3096), (0x30A1, 0x30FA), (0x4E00, 0x9FFF), (0xAC00, 0xD7A3), (0x1100, 0x1112), (0x1161, 0x1175),
              (0x11A8, 0x11C2), (0x20000, 0x200FF), (0xF900, 0xFA2D), (0x2F800, 0x2F8FF)]
SYMBOLS = [(0x21, 0x2F), (0x3A, 0x40), (0x5B, 0x60), (0x7B, 0x7E), (0xA1, 0xBF), (0x2010, 0x2027), (0x2190, 0x21FF),
           (0x2200, 0x22FF), (0x3001, 0x301F), (0xFE30, 0xFE4F), (0x212A, 0x212B), (0x17F, 0x17F)]
SPACES = [" ", "  ", "   ", "\n", "\n\n", "\r\n", "\t", " \n ", "\u00a0", "\u3000", "\u0085", "\u2003", "\u2028", "\v", "\f",
          "\u200b", "\ufeff", "\u180e", " " * 17, "\n" * 9, "\t\t  "]
EMOJI = ["😀", "👩‍👩‍👧‍👦", "🏳️‍🌈", "🇩🇪", "👍🏽", "❤️", "🤷🏾‍♂️", "1️⃣", "🫠"]
WORDS = ["the", "The", "and", " of", " in", "'s", "'S", "'ll", "'LL", "don't", "I'VE", "'ſ", "we'Re", "model", " quantization",
         "naïve", "Ångström", "e\u0301", "A\u030a", "ﬁ", "Straße", "İstanbul", "ǅ", "https://example.org/a?b=c&d=1", "x=3.14159",
         "1234567890", "12 345", "0x1F", "__init__", "C++20", "\u1100\u1161\u11a8", "क्षि", "한국어", "日本語のテキスト", "\U0001d400"]
SPECIAL = ["<|im_start|>", "<|im_end|>", "<|endoftext|>", "<think>", "</think>", "<|im_start", "|>", "<|x|>", "<tool_call>"]


def point(rng, ranges) -> str:
    low, high = rng.choice(ranges)
    return chr(rng.randint(low, high))


def assigned(rng) -> str:
    """A character of any kind, private and unassigned ones left out."""
    while True:
        character = chr(rng.choice([rng.randint(0x20, 0xD7FF), rng.randint(0xF900, 0xFFFD), rng.randint(0x10000, 0x2FFFF)]))
        if unicodedata.ucd_3_2_0.category(character) not in ("Cn", "Cs", "Co"):
            return character


def text(rng, special: list[str]) -> str:
    kind = rng.random()
    if kind < 0.02:
        return rng.choice(["", " ", "\n", "a" * 400, "ab" * 300, " " * 200, "é" * 150, "1" * 100, "-" * 130])
    pieces = []
    for _ in range(rng.randint(1, 24)):
        draw = rng.random()
        if draw < 0.22:
            pieces.append(rng.choice(WORDS))
        elif draw < 0.36:
            pieces.append(rng.choice(SPACES))
        elif draw < 0.50:
            pieces.append("".join(point(rng, LETTERS) for _ in range(rng.randint(1, 7))))
        elif draw < 0.58:
            pieces.append(point(rng, LETTERS) + "".join(point(rng, MARKS) for _ in range(rng.randint(1, 4))))
        elif draw < 0.66:
            pieces.append("".join(point(rng, DIGITS) for _ in range(rng.randint(1, 5))))
        elif draw < 0.74:
            pieces.append("".join(point(rng, IDEOGRAPHS) for _ in range(rng.randint(1, 5))))
        elif draw < 0.84:
            pieces.append("".join(point(rng, SYMBOLS) for _ in range(rng.randint(1, 3))))
        elif draw < 0.90:
            pieces.append(rng.choice(EMOJI))
        elif draw < 0.96:
            pieces.append(rng.choice(special))
        else:
            pieces.append(assigned(rng))
    return "".join(pieces)


def corpus() -> list[str]:
    sample = (bundled_model() / "calibration.txt").read_text()[:120_000].splitlines()
    rng = random.Random(2)
    return sample + [text(rng, SPECIAL) for _ in range(2000)]


def train(pattern: str, normalizer, ignore_merges: bool) -> Tokenizer:
    tokenizer = Tokenizer(models.BPE(ignore_merges=ignore_merges))
    tokenizer.normalizer = normalizer
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([
        pre_tokenizers.Split(Regex(pattern), behavior="isolated", invert=False),
        pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])  # fmt: skip
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(vocab_size=3000, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False)
    tokenizer.train_from_iterator(corpus(), trainer)
    return tokenizer


def llama3(folder: pathlib.Path) -> pathlib.Path:
    tokenizer = train(GPT4, None, ignore_merges=True)
    tokenizer.add_special_tokens(["<|begin_of_text|>", "<|im_start|>", "<|im_end|>"])
    begin = tokenizer.token_to_id("<|begin_of_text|>")
    tokenizer.post_processor = processors.Sequence([
        processors.ByteLevel(trim_offsets=False),
        processors.TemplateProcessing(single="<|begin_of_text|> $A", special_tokens=[("<|begin_of_text|>", begin)])])  # fmt: skip
    tokenizer.save(str(folder / "tokenizer.json"))
    return folder


def qwen(folder: pathlib.Path) -> pathlib.Path:
    tokenizer = train(QWEN, normalizers.NFC(), ignore_merges=False)
    tokenizer.add_special_tokens(["<|endoftext|>", "<|im_start|>", "<|im_end|>"])
    tokenizer.add_tokens([
        AddedToken("<think>", normalized=False), AddedToken("</think>", normalized=False, lstrip=True),
        AddedToken("<tool_call>", normalized=False, rstrip=True), AddedToken("<|x|>", normalized=False, single_word=True),
        AddedToken("Ångström", normalized=True), AddedToken("naïve", normalized=True, single_word=True)])  # fmt: skip
    tokenizer.save(str(folder / "tokenizer.json"))
    return folder


def sentencepiece(tokenizer: Tokenizer, folder: pathlib.Path) -> pathlib.Path:
    """Trained on characters, with tokens for all bytes, as SentencePiece models are converted."""
    trainer = trainers.BpeTrainer(
        vocab_size=2500, show_progress=False, special_tokens=["<unk>", "<s>", "</s>"] + [f"<0x{b:02X}>" for b in range(256)],
        limit_alphabet=500)  # fmt: skip
    tokenizer.train_from_iterator(corpus(), trainer)
    tokenizer.add_special_tokens(["<|im_start|>", "<|im_end|>"])
    tokenizer.add_tokens([AddedToken("\n\n", normalized=False), AddedToken("<think>", normalized=False)])
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    tokenizer.save(str(folder / "tokenizer.json"))
    saved = json.loads((folder / "tokenizer.json").read_text())
    saved["added_tokens"] = [t for t in saved["added_tokens"] if not t["content"].startswith("<0x")]
    (folder / "tokenizer.json").write_text(json.dumps(saved))
    return folder


def llama2(folder: pathlib.Path) -> pathlib.Path:
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    return sentencepiece(tokenizer, folder)


def mistral(folder: pathlib.Path) -> pathlib.Path:
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    return sentencepiece(tokenizer, folder)


def metaspace(folder: pathlib.Path) -> pathlib.Path:
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=False, fuse_unk=False))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always", split=True)
    return sentencepiece(tokenizer, folder)


def gemma3(folder: pathlib.Path) -> pathlib.Path:
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    tokenizer.normalizer = normalizers.Replace(" ", "▁")
    tokenizer.pre_tokenizer = pre_tokenizers.Split(" ", behavior="merged_with_previous")
    return sentencepiece(tokenizer, folder)


FOLDERS = {
    "llama2": llama2,
    "mistral": mistral,
    "metaspace": metaspace,
    "gemma3": gemma3,
    "bundled": lambda _: bundled_model(),
    "smollm2": lambda _: pathlib.Path(os.environ["PRISMAQUANT_SMOLLM2"]),
    "llama3": llama3,
    "qwen": qwen,
}


def tokenize(folder: pathlib.Path, file: pathlib.Path) -> list[list[int]]:
    done = subprocess.run([PROGRAM, "tokenize", folder, "--text", file], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()]


@pytest.mark.parametrize("name", FOLDERS)
def test_equal_on_generated_strings(name, tmp_path):
    folder = FOLDERS[name](tmp_path)
    reference = Tokenizer.from_file(str(folder / "tokenizer.json"))
    added = [token.content for token in reference.get_added_tokens_decoder().values()]
    rng = random.Random(1)
    strings = [text(rng, SPECIAL + added) for _ in range(STRINGS)]
    file = tmp_path / "strings.jsonl"
    file.write_text("".join(json.dumps({"text": s}) + "\n" for s in strings))
    found = tokenize(folder, file)
    expected = [encoding.ids for encoding in reference.encode_batch(strings, add_special_tokens=False)]
    assert len(found) == STRINGS
    wrong = [i for i in range(STRINGS) if found[i] != expected[i]]
    assert not wrong, f"{len(wrong)} differ, first {strings[wrong[0]]!r}: {found[wrong[0]]} {expected[wrong[0]]}"


def test_text_files_give_a_line_of_ids_per_line(tmp_path):
    file = tmp_path / "lines.txt"
    file.write_text("first line\n\nthird <|im_end|> line\nlast")
    reference = Tokenizer.from_file(str(bundled_model() / "tokenizer.json"))
    assert tokenize(bundled_model(), file) == [
        reference.encode(line, add_special_tokens=False).ids for line in file.read_text().split("\n")
    ]


def calibration_windows(tokenizer_json: pathlib.Path, folder: pathlib.Path):
    """The windows that a probe of the bundled model with another tokenizer draws."""
    source = folder / "source"
    source.mkdir()
    for path in bundled_model().iterdir():
        if path.suffix == ".safetensors" or path.name in ("config.json", "model.safetensors.index.json"):
            (source / path.name).symlink_to(path)
    (source / "tokenizer.json").symlink_to(tokenizer_json)
    done = subprocess.run(
        [PROGRAM, "probe", source, "--work", folder / "work", "--calibration", bundled_model() / "heldout.txt",
         "--samples", "4", "--tokens", "16"], capture_output=True, text=True)  # fmt: skip
    assert done.returncode == 0, done.stderr
    return load_file(folder / "work" / "calibration.safetensors")["ids"]


def small_llama3(folder: pathlib.Path) -> pathlib.Path:
    """A tokenizer whose ids fit the bundled model's vocabulary of 2048."""
    tokenizer = Tokenizer(models.BPE(ignore_merges=True))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.train_from_iterator(corpus(), trainers.BpeTrainer(
        vocab_size=1000, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False))  # fmt: skip
    tokenizer.add_special_tokens(["<s>"])
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", tokenizer.token_to_id("<s>"))])  # fmt: skip
    tokenizer.save(str(folder / "tokenizer.json"))
    return folder / "tokenizer.json"


def test_windows_begin_with_bos_where_the_post_processor_adds_one(tmp_path):
    (tmp_path / "with").mkdir()
    made = small_llama3(tmp_path)
    ids = calibration_windows(made, tmp_path / "with")
    assert (ids[:, 0] == Tokenizer.from_file(str(made)).token_to_id("<s>")).all()
    assert (ids[:, 1:] != ids[0, 0]).all()
    (tmp_path / "without").mkdir()
    ids = calibration_windows(bundled_model() / "tokenizer.json", tmp_path / "without")
    assert (ids[:, 0] != ids[0, 0]).any()
