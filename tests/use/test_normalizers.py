"""Normalisers against whisper_normalizer's classes, ISO 639's tables and words that must stay whole."""

import json
import random
import unicodedata
from pathlib import Path

import pytest
from whisper_normalizer import indic
from whisper_normalizer.basic import BasicTextNormalizer
from whisper_normalizer.english import EnglishTextNormalizer

from gemma_mlx.errors import InputError
from gemma_mlx.languages import language_code, language_name
from gemma_mlx.normalizers import NAMES, normalizer, spaceless, tokens

ENGLISH = [
    "Mr. Smith's twenty-one dogs, uh, can't bark!",
    "[noise] It's the colour of £20 million (laughs).",
    "He'd gone to the 3rd theatre at five o'clock — alone.",
    "One oh one, two hundred and five, 12.5%",
    "",
    "  ",
]
LATIN = [  # no combining marks after NFKC: here Whisper's own form has nothing to destroy
    ("fr", "L'été, «ça va» (oui) — À bientôt [bruit] n°5!"),
    ("de", "Straßenbahn: Größe 12,5 – Äpfel & Öl"),
    ("Russian", "Привет, мир! Ёжик — 3-й."),
    ("es", "¿Qué tal? ¡Señor Núñez!"),
    ("vi", "Tiếng Việt rất khó, phải không?"),
    ("ko", "안녕하세요, 세계!"),
    ("el", "Καλημέρα, κόσμε· τι κάνεις;"),
    (None, "Dzień dobry, świecie…"),
]


@pytest.mark.parametrize("text", ENGLISH)
@pytest.mark.parametrize("language", ["en", "English", "en-GB", "eng"])
def test_english_is_whispers(text, language):
    assert normalizer("whisper", language)(text) == EnglishTextNormalizer()(text).strip()


@pytest.mark.parametrize(("language", "text"), LATIN)
def test_others_are_whispers_basic_form(language, text):
    assert normalizer("whisper", language)(text) == " ".join(BasicTextNormalizer()(text).split())


@pytest.mark.parametrize(
    ("language", "text", "expected"),
    [
        ("Hindi", "मैं घर जा रहा हूँ, हाँ: ज़रूर।", "मैं घर जा रहा हूँ हाँ ज़रूर"),
        ("ta", "நான் வீட்டிற்குச் சென்றேன்.", "நான் வீட்டிற்குச் சென்றேன்"),
        ("te", "నేను ఇంటికి వెళ్ళాను!", "నేను ఇంటికి వెళ్ళాను"),
        ("bn", "আমি বাড়ি যাচ্ছি। হ্যাঁ", "আমি বাড়ি যাচ্ছি হ্যাঁ"),
        ("th", "สวัสดีครับ ผมชื่อ, สมชาย", "สวัสดีครับผมชื่อสมชาย"),
        ("km", "សួស្តី​ពិភពលោក។", "សួស្តីពិភពលោក"),
        ("ar", "السَّلامُ عَلَيْكُمْ، مـــرحبا؟", "السلام عليكم مرحبا"),
        ("he", "שָׁלוֹם, עוֹלָם!", "שלום עולם"),
        ("fa", "می\u200cخواهم", "میخواهم"),
        ("pl", "jeden\u200bdwa \u2068trzy\u2069", "jeden dwa trzy"),
        ("si", "ආයුබෝවන්, ලෝකය", "ආයුබෝවන් ලෝකය"),
        ("bo", "བཀྲ་ཤིས།", "བཀྲ ཤིས"),
        ("yo", "Ẹ́ kú àárọ̀!", "ẹ́ kú àárọ̀"),
        ("tr", "Iğdır'dan İSTANBUL", "ığdır dan istanbul"),
        (None, "İstanbul", "istanbul"),
        ("zh", "你好， 世界！", "你好世界"),
        ("zh", "我 喜欢 Machine Learning 课 2 次", "我喜欢machine learning课2次"),
        ("ja", "東京 タワーへ、行こう。", "東京タワーへ行こう"),
        ("ja", "コーヒー ok 人々 ok あ\u3099 ok", "コーヒーok人々okあ\u3099ok"),
    ],
)
def test_words_stay_whole(language, text, expected):
    wanted = unicodedata.normalize("NFKC", expected)
    assert normalizer("whisper", language)(text) == wanted
    if any(unicodedata.category(c)[0] == "M" for c in wanted):
        assert BasicTextNormalizer()(text).split() != wanted.split()  # what Whisper's own form makes of them


@pytest.mark.parametrize(
    ("language", "one", "other"),
    [
        ("hi", "क्\u200dया", "क्या"),  # joiner or none
        ("hi", "\u095b", "\u091c\u093c"),  # za as one code point or two
        ("mr", "\u0929", "\u0928\u093c"),
        ("ml", "അവന്\u200d", "അവൻ"),  # chillu by joiner or atomic
        ("ta", "\u0b92\u0bd7", "\u0b94"),  # au in two parts
        ("bn", "\u09c7\u09be", "\u09cb"),
        ("hi", "१२ बजे", "12 बजे"),
        ("ar", "١٢", "12"),
        ("hi", "ए।", "ए|"),
    ],
)
def test_one_spelling_for_each_letter(language, one, other):
    clean = normalizer("whisper", language)
    assert clean(one) == clean(other)


INDIC = {
    "hi": (indic.DevanagariNormalizer, "पढ़ना ज़रूर क्\u200dया हूँ"),
    "ta": (indic.TamilNormalizer, "வீட்டிற்குச் சென்றேன்"),
    "te": (indic.TeluguNormalizer, "ఇంటికి వెళ్ళాను"),
    "bn": (indic.BengaliNormalizer, "বাড়ি যাচ্ছি"),
    "gu": (indic.GujaratiNormalizer, "હું ઘરે જાઉં છું"),
    "pa": (indic.PunjabiNormalizer, "ਮੈਂ ਘਰ ਜਾ ਰਿਹਾ"),
    "or": (indic.OdiaNormalizer, "ମୁଁ ଘରକୁ ଯାଉଛି"),
    "kn": (indic.KannadaNormalizer, "ನಾನು ಮನೆಗೆ ಹೋದೆ"),
    "ml": (indic.MalayalamNormalizer, "അവന്\u200d വീട്ടില്\u200d പോയി"),
}


@pytest.mark.parametrize("code", INDIC)
def test_letters_are_the_packages(code):
    made, text = INDIC[code]
    assert normalizer("whisper", code)(text) == unicodedata.normalize("NFKC", made()(text))


@pytest.mark.parametrize("code", [*INDIC, "mr", "ne", "as"])
def test_numbers_stay_numbers(code):
    """The package's classes refuse the first two and read one number inside another in the third."""
    clean = normalizer("whisper", code)
    zero = {"ta": 0xBE6, "te": 0xC66, "kn": 0xCE6, "ml": 0xD66, "gu": 0xAE6, "pa": 0xA66, "or": 0xB66}.get(code, 0x966)
    native = "".join(chr(zero + int(d)) for d in "23")
    assert clean(f"{native} 3.5 12 112") == "23 3 5 12 112"


SCRIPTS = {
    **{"hi": (0x900, 0x97F), "bn": (0x980, 0x9FF), "pa": (0xA00, 0xA7F), "gu": (0xA80, 0xAFF), "or": (0xB00, 0xB7F)},
    **{"ta": (0xB80, 0xBFF), "te": (0xC00, 0xC7F), "kn": (0xC80, 0xCFF), "ml": (0xD00, 0xD7F), "si": (0xD80, 0xDFF)},
    **{"th": (0xE00, 0xE7F), "lo": (0xE80, 0xEFF), "my": (0x1000, 0x109F), "km": (0x1780, 0x17FF)},
    **{"ar": (0x600, 0x6FF), "he": (0x590, 0x5FF), "zh": (0x4E00, 0x4EFF), "ja": (0x3040, 0x30FF), "fr": (0x41, 0x17F)},
}


@pytest.mark.parametrize("code", SCRIPTS)
def test_any_text_of_a_script(code):
    """Never raises; what is clean stays as it is; spaces are single; nothing of punctuation is left."""
    low, high = SCRIPTS[code]
    letters = [chr(i) for i in range(low, high + 1) if unicodedata.category(chr(i)) not in ("Cn", "Cs")]
    draws, clean = random.Random(code), normalizer("whisper", code)
    for _ in range(60):
        text = "".join(draws.choice(letters if draws.random() < 0.8 else "01 29.,:()-'|") for _ in range(25))
        found = clean(text)
        assert clean(found) == found
        assert found == " ".join(found.split())
        assert not [c for c in found if unicodedata.category(c)[0] in "PS"]


def test_marks_are_kept():
    """No text of an Indic or Thai script loses a mark; whisper's form would lose all."""
    for code, (_, text) in INDIC.items():
        kept = sum(unicodedata.category(c)[0] == "M" for c in normalizer("whisper", code)(text))
        written = sum(unicodedata.category(c)[0] == "M" for c in unicodedata.normalize("NFKC", text))
        chillus = text.count("\u0d4d\u200d")  # these become letters
        assert kept == written - chillus > 0


def test_tokens():
    assert tokens("สวัสดี", "th") == ["ส", "วั", "ส", "ดี"]
    assert tokens("我用iphone手机 ok", "zh-CN") == ["我", "用", "iphone", "手", "机", "ok"]
    assert tokens("コーヒー人々", "ja") == ["コ", "ー", "ヒ", "ー", "人", "々"]
    assert tokens("東京", None) == ["東京"]
    assert tokens(" a  b ", "en") == ["a", "b"]
    assert [spaceless(x) for x in ("Chinese", "ja-JP", "lao", "Khmer", "my", "yue", "ko", "hi", None)] == [
        *[True] * 6,
        *[False] * 3,
    ]


def test_names():
    assert set(NAMES) >= {"whisper", "basic", "none"}
    with pytest.raises(InputError, match="expected whisper, basic, none or squad, got 'Whisper'"):
        normalizer("Whisper")
    assert normalizer("none", "hi")(" A  b\n") == "A b"
    assert normalizer("basic", "en")("It's 5") == "its 5"
    assert normalizer("squad")("The  quick, (brown) fox's A") == "quick brown foxs"


@pytest.mark.parametrize(
    "given",
    [
        "Hindi",
        "hindi",
        "hi",
        "hin",
        "hi-IN",
        "hi_in",
        "HIN_Deva",
        "hin-Deva-IN",
        " Hindi (India) ",
        "hindi (Devanagari)",
    ],
)
def test_spellings_of_a_language(given):
    assert language_code(given) == "hi"
    assert language_name(given) == "Hindi"


def test_unknown_languages():
    assert [language_code(x) for x in (None, "", "  ", "Klingon", "x-y", "123")] == [None] * 6
    assert [language_code(x) for x in ("cmn_hans_cn", "yue_hant_hk", "zh-HK", "arb", "swh", "Farsi")] == [
        *("zh", "yue", "zh", "ar", "sw", "fa")
    ]


def test_languages_are_whispers():
    """Every code and name of Whisper's list is known, and they name the same language."""
    from transformers.models.whisper.tokenization_whisper import LANGUAGES, TO_LANGUAGE_CODE

    renamed = {"jw": "jv"}  # Whisper's own code for Javanese
    for code, name in LANGUAGES.items():
        assert language_code(name) == renamed.get(code, code), name
        assert language_code(code) == renamed.get(code, code)
    for name, code in TO_LANGUAGE_CODE.items():
        assert language_code(name) == renamed.get(code, code), name


REGISTRY = Path("/usr/share/iso-codes/json/iso_639-2.json")


@pytest.mark.skipif(not REGISTRY.exists(), reason="Debian's iso-codes are not installed")
def test_languages_are_those_of_the_registry():
    two_letters = [entry for entry in json.loads(REGISTRY.read_text())["639-2"] if "alpha_2" in entry]
    assert len(two_letters) > 180
    for entry in two_letters:
        for key in ("alpha_2", "alpha_3", "bibliographic"):
            assert language_code(entry.get(key, entry["alpha_2"])) == entry["alpha_2"]
        if not set(entry["name"]) & set("(,"):
            for name in entry["name"].split("; "):
                assert language_code(name) == entry["alpha_2"], name
