"""Word lists and made-up words that the generators draw from; none of them holds a digit."""

import itertools

ADJECTIVES = tuple(
    """
    able amber ample ancient arid ashen autumn azure balmy bitter blank blunt bold brave brief
    bright brisk broad bronze busy calm candid careful cedar cheap chilly civil clean clear clever
    cloudy coarse cold common coral cosy crisp curious damp dapper dark dear deep dense distant
    dry dusty eager early earnest easy elder empty even faint fair famous fancy fast feral fine
    firm flat fleet fond formal frail free fresh frosty gentle giant gilded glad gloomy golden good
    grand grave gray green handy happy hardy hasty hazel heavy hidden high hollow honest humble
    idle ivory jolly keen kind large late lazy lean level light lively lofty lone long loose loud
    loyal lucky lunar major mellow merry mighty mild minor misty modern modest mossy muddy narrow
    native neat noble novel odd olive open orange outer pale patient plain polite proud pure quick
    quiet rapid rare ready rich ripe robust rosy rough round royal rural rustic sandy scarlet
    """.split()
)
NOUNS = tuple(
    """
    acorn anchor anvil apple arch arrow badge banner barge barn barrel basin basket beacon bell
    bench birch blade blanket board boat bottle bowl branch brick bridge brook broom brush bucket
    button cabin cactus candle canoe canyon carpet castle cave chain chair chapel cherry chest
    chimney cliff clock cloud clover coach coast comet compass copper cork cottage cradle crane
    crater creek crown curtain daisy dam desert desk ditch dock dome door drawer drum dune eagle
    elbow elm ember engine falcon farm feather fence fern ferry field finch flag flute forest forge
    fountain fox garden gate glacier glove goose grape grove guitar hammer harbor harp hatch hawk
    hedge helmet heron hill hinge horn hotel house inlet island jacket jar jewel kettle kite ladder
    lagoon lake lamp lantern lark leaf ledge lemon lever lily linen lion lock lodge loom magnet
    maple market marsh mast meadow mill mirror moat moon moss mountain needle nest oak oar oasis
    """.split()
)
VERBS = tuple(
    """
    carried followed passed painted watched crossed reached mended guarded measured lifted crowned
    warmed shaded circled answered covered joined kept left lit marked moved found held hid
    """.split()
)
PLACES = ("near", "behind", "above", "beside", "under", "beyond", "before", "past", "around")
OPENINGS = (
    "In the morning", "By noon", "After the rain", "Late in the year", "For a while", "As ever",
    "Long ago", "That evening", "Without a word", "On the way home", "Once more", "At last",
)  # fmt: skip
FILLER = tuple(
    """
    and so it is with the one who has been there and now goes on as before to see what is left of
    the day in a place where no one can say more than that
    """.split()
)
"""Short frequent words, of which most are a single token in most vocabularies."""

ONSETS, VOWELS = "bdfgklmnprstvz", "aeiou"
SYLLABLES = tuple(a + b for a, b in itertools.product(ONSETS, VOWELS))


def made_up(number: int, syllables: int = 2) -> str:
    """The made-up word of that number: different words for different numbers.

    Raises:
        ValueError: there are not so many words of this many syllables.
    """
    if not 0 <= number < count_made_up(syllables):
        raise ValueError(
            f"there are {count_made_up(syllables)} words of {syllables} syllables, number {number} "
            "is none of them: use more syllables."
        )
    word = ""
    for _ in range(syllables):
        number, index = divmod(number, len(SYLLABLES))
        word += SYLLABLES[index]
    return word


def count_made_up(syllables: int = 2) -> int:
    """How many made-up words of that many syllables there are."""
    return len(SYLLABLES) ** syllables
