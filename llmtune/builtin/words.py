"""The words that the generated corpus is made of. All of them were typed in by us; no outside text is used."""

from __future__ import annotations

COLOURS = "red blue green yellow black white brown grey purple orange pink silver golden dark pale".split()
QUALITIES = (
    "small large old new round heavy light long short clean broken wooden soft warm cold dry empty full cheap fine "
    "strong thin wide narrow plain bright simple rough smooth quiet fresh sharp flat deep spare folding painted"
).split()
MATERIALS = "wood iron copper glass stone paper wool cotton leather clay steel straw brass tin silk rope".split()

# Things that can be held, bought and sold. Every noun takes a plain "s" in the plural.
THINGS = (
    "apple basket bell blanket book bottle bowl bucket button candle cap card chair clock coat coin cup curtain desk "
    "doll door drum egg envelope fan feather flower fork glove hammer hat helmet jar kettle key kite lamp lantern "
    "letter map marble mirror mug nail needle notebook orange oven pan pear pen pencil pillow pin pipe plate plum "
    "pot potato rake ribbon ring rope rug sack saddle scarf shell shirt shoe shovel sock spoon stamp stone stool "
    "sword table tent ticket towel toy tray umbrella vase violin wagon wheel whistle window balloon cookie cake "
    "sandwich sticker bead magazine pie muffin crayon picture clip pie tile brick barrel bracelet necklace poster"
).split()
ANIMALS = "dog cat horse cow hen duck goat pig rabbit bird owl frog bear lion tiger fox crow turtle bee donkey".split()
FOODS = "bread milk butter cheese rice soup tea coffee honey salt sugar flour water juice corn pasta meat jam".split()
PLACES = (
    "market garden school river kitchen library harbour station shop farm forest bridge tower museum park field "
    "village hall mill office house barn beach street square theatre hospital bakery store yard island mountain"
).split()
JOBS = (
    "baker teacher farmer sailor doctor painter driver singer builder nurse tailor clerk cook miller fisher guard "
    "potter writer gardener carpenter student librarian keeper captain merchant weaver smith pilot judge miner"
).split()
KIN = "friend brother sister mother father uncle aunt cousin neighbour daughter son teacher partner grandmother".split()
WEATHER = "sunny rainy windy cloudy foggy snowy stormy cold warm hot calm dark".split()
DAYS = "Monday Tuesday Wednesday Thursday Friday Saturday Sunday".split()
MONTHS = "January February March April May June July August September October November December".split()
TIMES = "morning|evening|afternoon|night|day|week|month|summer|winter|spring|autumn|year|weekend|noon|holiday".split(
    "|"
)
FEELINGS = "happy tired sad proud angry glad calm hungry surprised worried afraid busy ready late lucky sure".split()
NUMBERS = (
    "zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen seventeen "
    "eighteen nineteen twenty"
).split()

# present, past, -ing; each takes a thing as its object
VERBS = [
    tuple(v.split("/"))
    for v in (
        "buys/bought/buying sells/sold/selling finds/found/finding loses/lost/losing makes/made/making "
        "takes/took/taking brings/brought/bringing keeps/kept/keeping needs/needed/needing wants/wanted/wanting "
        "sees/saw/seeing carries/carried/carrying paints/painted/painting washes/washed/washing "
        "opens/opened/opening cleans/cleaned/cleaning moves/moved/moving holds/held/holding "
        "repairs/repaired/repairing packs/packed/packing counts/counted/counting likes/liked/liking "
        "hides/hid/hiding gets/got/getting uses/used/using collects/collected/collecting "
        "orders/ordered/ordering sends/sent/sending receives/received/receiving borrows/borrowed/borrowing "
        "gives/gave/giving shares/shared/sharing eats/ate/eating cuts/cut/cutting"
    ).split()
]
MOVES = "walked ran went drove travelled hurried came returned climbed rode sailed moved".split()
SAYS = "said asked answered replied whispered called shouted wrote thought added".split()
ADVERBS = "quickly slowly carefully quietly suddenly often never always soon finally gently together again".split()
OPPOSITES = [
    tuple(p.split("/"))
    for p in (
        "hot/cold big/small old/new long/short up/down left/right day/night early/late fast/slow full/empty hard/soft "
        "high/low light/dark open/closed rich/poor strong/weak wet/dry young/old first/last more/less before/after"
    ).split()
]
BELONGS = [
    tuple(p.split("/"))
    for p in (
        "dog/animal horse/animal owl/bird crow/bird apple/fruit pear/fruit plum/fruit potato/vegetable hammer/tool "
        "shovel/tool rake/tool chair/piece_of_furniture table/piece_of_furniture shirt/piece_of_clothing "
        "coat/piece_of_clothing drum/musical_instrument violin/musical_instrument iron/metal copper/metal tin/metal "
        "Monday/day March/month winter/season summer/season red/colour blue/colour tea/drink milk/drink"
    ).split()
]
UNITS = [
    tuple(p.split("/"))
    for p in (
        "minute/60/seconds hour/60/minutes day/24/hours week/7/days year/12/months dollar/100/cents foot/12/inches "
        "yard/3/feet dozen/12/pieces metre/100/centimetres kilogram/1000/grams kilometre/1000/metres pound/16/ounces"
    ).split()
]
SYMBOLS = [
    tuple(p.rsplit("/", 1))
    for p in (
        "{/opening_brace }/closing_brace [/opening_bracket ]/closing_bracket (/opening_parenthesis "
        ")/closing_parenthesis :/colon ;/semicolon ,/comma ./full_stop !/exclamation_mark ?/question_mark "
        "\"/quotation_mark '/apostrophe -/hyphen _/underscore +/plus_sign =/equals_sign */asterisk //slash "
        "\\/backslash |/vertical_bar </less-than_sign >/greater-than_sign #/hash @/at_sign &/ampersand %/percent_sign "
        "$/dollar_sign ^/caret ~/tilde `/backtick"
    ).split()
]
OTHER_SCRIPTS = (
    "äöüßéèêàçñøåæœõîïłšžčćđğışœ€£¥§°«»„“”—…· αβγδεζηθικλμνξπρστφχψω бвгдежзийклмнптфцчшщыьэюя "
    "אבגדהוזחט ابتثجحخد 一二三四五六七八九十日月火水木金土山川 "
    "あいうえおかきくけこ アイウエオカキクケコ 가나다라마바사 😀🙂🎉🚀🌍🐍🔥✨"
).split()
