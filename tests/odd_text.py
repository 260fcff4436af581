"""Texts of many scripts, and what else a field may hold. Written as escapes where an editor would hide or turn them."""

from __future__ import annotations

SCRIPTS = {
    "Cyrillic": "съешь ещё этих мягких булок",
    "Greek": "Ξεσκεπάζω τὴν ψυχοφθόρα βδελυγμία",
    "Arabic": "نص حكيم له سر قاطع",
    "Hebrew with direction marks": "\u200fשלום עולם\u200e (abc)",
    "Persian with a joiner": "می\u200cخواهم بروم",
    "Chinese": "我能吞下玻璃而不伤身体",
    "Japanese": "いろはにほへと ちりぬるを カード",
    "Korean": "다람쥐 헌 쳇바퀴",
    "Thai": "เป็นมนุษย์สุดประเสริฐ",
    "Devanagari": "हिन्दी में लिखा हुआ",
    "Tamil": "யாமறிந்த மொழிகளிலே",
    "Khmer": "ខ្ញុំអាចញ៉ាំកញ្ចក់បាន",
    "Burmese": "မြန်မာစာ ရေးသည်",
    "Ethiopic": "ሰማይ አይታረስ ንጉሥ",
    "Vietnamese": "Tiếng Việt có dấu",
    "German": "Zwölf Boxkämpfer jagen Straße",
    "second planes": "\U00010400\U00010401 \U00020000\U0002a6d6",
    "mathematical letters": "\U0001d400\U0001d401 \U0001d7d8",
    "emoji": "\U0001f389 \U0001f44d\U0001f3fd \U0001f1e9\U0001f1ea\U0001f1eb\U0001f1f7 \u2764\ufe0f",
    "an emoji family": "\U0001f468\u200d\U0001f469\u200d\U0001f467\u200d\U0001f466 home",
    "composed letters": "caf\u00e9 na\u00efve",
    "decomposed letters": "cafe\u0301 nai\u0308ve",
    "stacked marks": "Z\u0351\u036b\u0343a\u0321\u030al",
}
AWKWARD = {
    "zero-width characters": "ab\u200bcd\u2060ef\u00adgh",
    "line and paragraph separators": "one\u2028two\u2029three\x85four",
    "spaces that do not break": "10\u00a0000\u202f000\u3000end",
    "tabs": "a\tb\t\tc",
    "line breaks": "first\nsecond\nthird",
    "control characters": "bell\x07 escape\x1b[31m start\x01 end",
    "special tokens": "</s> <|im_start|>user <s> <unk> [INST]",
    "a byte order mark within": "be\ufefffore",
    "a direction turned around": "price \u202e001\u202c end",
    "markup": '<b dir="rtl">&amp;</b> {{ text }} $x^2$ [bold]',
    "quotes and commas": "say \"hi\", then; 'go' \\n",
    "private use and unassigned": "\ue000 \U000f0000 \u0378",
}
TEXTS = {**SCRIPTS, **AWKWARD}
# In a CSV or TSV file the line ends of a field are read as \n, whichever they are; elsewhere they stay.
WITH_CARRIAGE_RETURNS = "one\r\ntwo\rthree"
