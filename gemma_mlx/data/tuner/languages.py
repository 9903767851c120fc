"""What a row's ``language`` means under the existing tuner's ``language_mode``.

==================  ======================================================================================
``language_mode``   the language that the model is told
==================  ======================================================================================
``strict``          the row's own cell; none where it is empty or ``??`` (unknown)
``mixed``           none, whatever the cell says (``auto`` is the same)
``override:XX``     XX for every row, whatever the cell says; none for ``override:??``
==================  ======================================================================================

No mode leaves a row out. (There the modes act in evaluation alone, its training names no language at all; here they
decide what the transcription prompt says, in training too.) Codes are told by name: ``fr``, ``FR`` and ``fr-CA`` are
"French". What is no known code is told as written.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from gemma_mlx.errors import InputError

UNKNOWN = "??"
STRICT, MIXED, OVERRIDE = "strict", "mixed", "override:"

_NAMES = """
aa Afar|ab Abkhazian|ae Avestan|af Afrikaans|ak Akan|am Amharic|an Aragonese|ar Arabic|as Assamese|av Avaric|ay Aymara
az Azerbaijani|ba Bashkir|be Belarusian|bg Bulgarian|bh Bihari|bi Bislama|bm Bambara|bn Bengali|bo Tibetan|br Breton
bs Bosnian|ca Catalan|ce Chechen|ceb Cebuano|ch Chamorro|co Corsican|cr Cree|cs Czech|cu Church Slavic|cv Chuvash
cy Welsh|da Danish|de German|dv Divehi|dz Dzongkha|ee Ewe|el Greek|en English|eo Esperanto|es Spanish|et Estonian
eu Basque|fa Persian|ff Fulah|fi Finnish|fil Filipino|fj Fijian|fo Faroese|fr French|fy Western Frisian|ga Irish
gd Scottish Gaelic|gl Galician|gn Guarani|gu Gujarati|gv Manx|ha Hausa|haw Hawaiian|he Hebrew|hi Hindi|ho Hiri Motu
hr Croatian|ht Haitian Creole|hu Hungarian|hy Armenian|hz Herero|ia Interlingua|id Indonesian|ie Interlingue|ig Igbo
ii Sichuan Yi|ik Inupiaq|io Ido|is Icelandic|it Italian|iu Inuktitut|iw Hebrew|ja Japanese|jv Javanese|jw Javanese
ka Georgian|kg Kongo|ki Kikuyu|kj Kuanyama|kk Kazakh|kl Kalaallisut|km Khmer|kn Kannada|ko Korean|kr Kanuri
ks Kashmiri|ku Kurdish|kv Komi|kw Cornish|ky Kyrgyz|la Latin|lb Luxembourgish|lg Ganda|li Limburgish|ln Lingala|lo Lao
lt Lithuanian|lu Luba-Katanga|lv Latvian|mg Malagasy|mh Marshallese|mi Maori|mk Macedonian|ml Malayalam|mn Mongolian
mr Marathi|ms Malay|mt Maltese|my Burmese|na Nauru|nb Norwegian Bokmål|nd North Ndebele|ne Nepali|ng Ndonga|nl Dutch
nn Norwegian Nynorsk|no Norwegian|nr South Ndebele|nv Navajo|ny Chichewa|oc Occitan|oj Ojibwa|om Oromo|or Odia
os Ossetian|pa Punjabi|pi Pali|pl Polish|ps Pashto|pt Portuguese|qu Quechua|rm Romansh|rn Rundi|ro Romanian|ru Russian
rw Kinyarwanda|sa Sanskrit|sc Sardinian|sd Sindhi|se Northern Sami|sg Sango|si Sinhala|sk Slovak|sl Slovenian|sm Samoan
sn Shona|so Somali|sq Albanian|sr Serbian|ss Swati|st Southern Sotho|su Sundanese|sv Swedish|sw Swahili|ta Tamil
te Telugu|tg Tajik|th Thai|ti Tigrinya|tk Turkmen|tl Tagalog|tn Tswana|to Tongan|tr Turkish|ts Tsonga|tt Tatar|tw Twi
ty Tahitian|ug Uyghur|uk Ukrainian|ur Urdu|uz Uzbek|ve Venda|vi Vietnamese|vo Volapük|wa Walloon|wo Wolof|xh Xhosa
yi Yiddish|yo Yoruba|yue Cantonese|za Zhuang|zh Chinese|zu Zulu
"""
NAMES: dict[str, str] = dict(entry.split(" ", 1) for entry in _NAMES.strip().replace("\n", "|").split("|"))
"""Code (ISO 639-1, and a few longer ones) -> English name."""


def language_name(code: str) -> str:
    """``French`` of ``fr``, ``FR`` or ``fr-CA``; text that is no known code as it is."""
    code = code.strip()
    return NAMES.get(code.replace("_", "-").split("-")[0].lower(), code)


@dataclass(frozen=True)
class LanguageMode:
    """How a row's language is read; see the top of this file.

    Attributes:
        strict: the row's own cell counts.
        forced: the language of every row; "" for none.
    """

    strict: bool
    forced: str = ""

    @classmethod
    def parse(cls, mode: str) -> LanguageMode:
        """Raises InputError for a mode that there is not."""
        mode = mode.strip()
        if mode == STRICT:
            return cls(True)
        if mode in (MIXED, "auto"):
            return cls(False)
        forced = mode.removeprefix(OVERRIDE).strip()
        if mode.startswith(OVERRIDE) and forced:
            return cls(False, "" if forced == UNKNOWN else language_name(forced))
        raise InputError(f"language_mode: expected {STRICT}, {MIXED} or {OVERRIDE}XX (a language code), got {mode!r}")

    def language(self, cell: Any) -> str:
        """The language that the model is told for a row with this cell; "" for none."""
        text = "" if cell is None else str(cell).strip()
        return self.forced if not self.strict else "" if text == UNKNOWN else language_name(text)
