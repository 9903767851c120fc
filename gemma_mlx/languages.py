"""Languages by code or English name: what a row's ``language`` cell means."""

from __future__ import annotations

import re
from functools import cache

# ISO 639-1: its code, the ISO 639-2 codes (terminological; bibliographic), the English names.
_ISO_639 = """
aa aar: Afar
ab abk: Abkhazian
ae ave: Avestan
af afr: Afrikaans
ak aka: Akan
am amh: Amharic
an arg: Aragonese
ar ara: Arabic
as asm: Assamese
av ava: Avaric
ay aym: Aymara
az aze: Azerbaijani
ba bak: Bashkir
be bel: Belarusian
bg bul: Bulgarian
bh bih: Bihari; Bihari languages
bi bis: Bislama
bm bam: Bambara
bn ben: Bengali; Bangla
bo bod tib: Tibetan
br bre: Breton
bs bos: Bosnian
ca cat: Catalan; Valencian
ce che: Chechen
ch cha: Chamorro
co cos: Corsican
cr cre: Cree
cs ces cze: Czech
cu chu: Church Slavic; Old Slavonic; Church Slavonic; Old Bulgarian; Old Church Slavonic
cv chv: Chuvash
cy cym wel: Welsh
da dan: Danish
de deu ger: German
dv div: Divehi; Dhivehi; Maldivian
dz dzo: Dzongkha
ee ewe: Ewe
el ell gre: Greek
en eng: English
eo epo: Esperanto
es spa: Spanish; Castilian
et est: Estonian
eu eus baq: Basque
fa fas per: Persian; Farsi
ff ful: Fulah
fi fin: Finnish
fj fij: Fijian
fo fao: Faroese
fr fra fre: French
fy fry: Western Frisian; Frisian
ga gle: Irish; Irish Gaelic
gd gla: Scottish Gaelic; Gaelic
gl glg: Galician
gn grn: Guarani; Guaraní
gu guj: Gujarati
gv glv: Manx
ha hau: Hausa
he heb: Hebrew
hi hin: Hindi
ho hmo: Hiri Motu
hr hrv: Croatian
ht hat: Haitian Creole; Haitian
hu hun: Hungarian
hy hye arm: Armenian
hz her: Herero
ia ina: Interlingua
id ind: Indonesian
ie ile: Interlingue; Occidental
ig ibo: Igbo
ii iii: Sichuan Yi; Nuosu
ik ipk: Inupiaq
io ido: Ido
is isl ice: Icelandic
it ita: Italian
iu iku: Inuktitut
ja jpn: Japanese
jv jav: Javanese
ka kat geo: Georgian
kg kon: Kongo
ki kik: Kikuyu; Gikuyu
kj kua: Kuanyama; Kwanyama
kk kaz: Kazakh
kl kal: Kalaallisut; Greenlandic
km khm: Khmer; Central Khmer
kn kan: Kannada
ko kor: Korean
kr kau: Kanuri
ks kas: Kashmiri
ku kur: Kurdish; Kurmanji
kv kom: Komi
kw cor: Cornish
ky kir: Kyrgyz; Kirghiz
la lat: Latin
lb ltz: Luxembourgish; Letzeburgesch
lg lug: Ganda
li lim: Limburgish; Limburgan; Limburger
ln lin: Lingala
lo lao: Lao
lt lit: Lithuanian
lu lub: Luba-Katanga
lv lav: Latvian
mg mlg: Malagasy
mh mah: Marshallese
mi mri mao: Maori; Māori
mk mkd mac: Macedonian
ml mal: Malayalam
mn mon: Mongolian
mr mar: Marathi
ms msa may: Malay
mt mlt: Maltese
my mya bur: Burmese; Myanmar
na nau: Nauru
nb nob: Norwegian Bokmål; Bokmål
nd nde: North Ndebele
ne nep: Nepali
ng ndo: Ndonga
nl nld dut: Dutch; Flemish
nn nno: Norwegian Nynorsk; Nynorsk
no nor: Norwegian
nr nbl: South Ndebele
nv nav: Navajo; Navaho
ny nya: Chichewa; Chewa; Nyanja
oc oci: Occitan; Provençal
oj oji: Ojibwa
om orm: Oromo
or ori: Odia; Oriya
os oss: Ossetian; Ossetic
pa pan: Punjabi; Panjabi
pi pli: Pali
pl pol: Polish
ps pus: Pashto; Pushto
pt por: Portuguese
qu que: Quechua
rm roh: Romansh
rn run: Rundi
ro ron rum: Romanian; Moldavian; Moldovan
ru rus: Russian
rw kin: Kinyarwanda
sa san: Sanskrit
sc srd: Sardinian
sd snd: Sindhi
se sme: Northern Sami; Sami
sg sag: Sango
si sin: Sinhala; Sinhalese
sk slk slo: Slovak
sl slv: Slovenian
sm smo: Samoan
sn sna: Shona
so som: Somali
sq sqi alb: Albanian
sr srp: Serbian
ss ssw: Swati
st sot: Southern Sotho
su sun: Sundanese
sv swe: Swedish
sw swa: Swahili; Kiswahili
ta tam: Tamil
te tel: Telugu
tg tgk: Tajik
th tha: Thai
ti tir: Tigrinya
tk tuk: Turkmen
tl tgl: Tagalog
tn tsn: Tswana
to ton: Tongan; Tonga
tr tur: Turkish
ts tso: Tsonga
tt tat: Tatar
tw twi: Twi
ty tah: Tahitian
ug uig: Uyghur; Uighur
uk ukr: Ukrainian
ur urd: Urdu
uz uzb: Uzbek
ve ven: Venda
vi vie: Vietnamese
vo vol: Volapük
wa wln: Walloon
wo wol: Wolof
xh xho: Xhosa
yi yid: Yiddish
yo yor: Yoruba
za zha: Zhuang; Chuang
zh zho chi: Chinese; Mandarin; Mandarin Chinese
zu zul: Zulu
ast: Asturian
ceb: Cebuano
ckb: Central Kurdish; Sorani; Sorani Kurdish
fil: Filipino
haw: Hawaiian
kea: Kabuverdianu; Cape Verdean Creole
kok: Konkani
luo: Luo
mai: Maithili
nso: Northern Sotho; Sepedi; Pedi
umb: Umbundu
yue: Cantonese; Yue Chinese
"""
# ISO 639-3 codes of what an ISO 639-1 code above stands for; data sets name their languages by them.
_MEMBERS = """
cmn=zh arb=ar pes=fa prs=fa swh=sw ory=or npi=ne azj=az ekk=et lvs=lv zsm=ms khk=mn uzn=uz plt=mg als=sq
ydd=yi gaz=om kmr=ku pbt=ps fuv=ff knc=kr ayr=ay quy=qu gug=gn jw=jv
"""


@cache
def _known() -> tuple[dict[str, str], dict[str, str]]:
    """(code or small name -> code, code -> name)."""
    codes, names = dict(pair.split("=") for pair in _MEMBERS.split()), {}
    for line in _ISO_639.strip().splitlines():
        spelled, called = line.split(": ")
        code, *others = spelled.split()
        names[code] = called.split("; ")[0]
        for name in (code, *others, *called.lower().split("; ")):
            codes[name] = code
    return codes, names


def names() -> dict[str, str]:
    """Code -> English name: ISO 639-1's codes, and longer ones of languages without such."""
    return _known()[1]


def language_code(language: str | None) -> str | None:
    """The shortest ISO 639 code of a language given by code or English name; None where it is not known.

    "Hindi", "hindi", "hi", "hin", "hi-IN", "hi_in", "hin_Deva" and "Hindi (India)" are all "hi".
    """
    codes, _ = _known()
    text = re.sub(r"\s*\(.*?\)", "", (language or "").strip().lower())
    return codes.get(text) or codes.get(re.split(r"[-_]", text)[0])


def language_name(language: str | None) -> str | None:
    """The English name of a language given as for `language_code`; None where it is not known."""
    return names().get(language_code(language) or "")
