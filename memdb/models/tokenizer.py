"""A small tokenizer that is built offline, for the models that memdb builds itself.

Ordinary words are whole tokens, with the space before them, and everything else is bytes: every text encodes
and comes back unchanged, and a random model prints words. Nothing is trained, so the ids depend on the word
list alone.

    "the red star?"  ->  "t" "h" "e" " red" " star" "?"
"""

from __future__ import annotations

from collections.abc import Iterable

from tokenizers import AddedToken, Tokenizer, decoders, normalizers, pre_tokenizers
from tokenizers.models import BPE
from transformers import PreTrainedTokenizerFast

from memdb.schemas.errors import UsageError

PAD, START, END, IMAGE, VIDEO = "<|endoftext|>", "<|im_start|>", "<|im_end|>", "<image>", "<video>"
SPECIAL_TOKENS = (PAD, START, END, IMAGE, VIDEO)
BYTES_FIRST = len(SPECIAL_TOKENS)  # id of the first byte token
WORDS_FIRST = BYTES_FIRST + 256  # id of the first word
WORDS_MAX = 100_000

_LIST = """
a about above across after again against ago all almost along already also always am among an and animal
another answer any anyone anything appears are area arm around arrives as ask at away baby back bag ball bar
basket be bear beautiful became because become bed been before began begin behind being below bench bend
beneath beside best better between beyond big bike bird bit black blue board boat body book both bottle
bottom bounces bowl box boy break bridge bright bring broken brother brown building bus but buy by cake call
came camera can candle cap car card carries cat catch centre chair change chases child children church
circle circles city clear climbs clock close closes cloud coat coffee cold colour come comes cook corner
could counts covers crosses crowd cube cup cuts cyan dance dark day deep desk diamond did different dish
does dog doing done door down draw drinks drives drops dry during each early easy eat edge eight either
eleven else empty end enough enters even evening ever every everyone exit eye face fall falls family far
fast father feet fell few field fifth fill film final find fire first fish five flag flat floor flower fly
fold follow food foot for forest found four fourth frame friend from front fruit full game garden gate gave
get girl give glass go goes gold gone good got grass gray great green grey ground group grow grows had half
hall hand hands hangs happen happened happens hard has hat have he head hear heard heart heavy held hello
help her here hers high hill him his hit hits hold holds hole home horse hot hour hours house how hundred i
ice if in inside into is island it its jacket jumps just keep key kick kitchen kite knife know lake lamp
land large last late later laugh leaf learn least leave leaves left leg less let letter lie lies lift light
like line lion list little live living long look looks lost lot loud low machine made magenta main make man
many map mark market may me mean meet men metal middle might mile milk minute minutes mirror moment money
moon more morning most mother mountain mouth move moved moves moving much music must my name near neck need
never new next night nine no nobody nose not note nothing now number object ocean of off often old on once
one only open opens or orange order other our out outside oval over own page paint pair pale paper park part
pass passes past path pattern pen people person phone picture piece pink place plan plane plant plate play
plays please point points pot pour press pull purple push puts quick quickly quiet quite rain ran reach read
ready real red rest return rides right ring rises river road rock roll rolls roof room rope rotates round
row run runs said sail same sand sat saw say school screen sea seat second seconds see seen sees seven
several shadow shakes shall shape shapes she sheep shelf shell ship shirt shoe shop short should shows
shrinks side sign silver since sister sit sits six size sky sleep slides slow slowly small smile smooth snow
so soft some someone something song soon sound south space speak spin spins splits square stair stand stands
star starts stays step still stone stop stops store storm story straight street strong such sun surface
sweet swim table take taken talk tall tea team tell ten than that the their them then there these they thin
thing things think third this those three through throws time tiny to today together told too took top touch
toward towards tower town toy track train tree triangle truck true try turn turns twelve twenty twice two
under until up upon us use van very video view violet visible visit voice wait walk walks wall want warm was
wash watch water wave way we wear week well went were west wet what wheel when where which while white who
whole whose why wide will wind window with within without woman women wood word work world would write wrong
year yellow yes yet you young your zero
"""
WORDS = tuple(_LIST.split())


def build_tokenizer(
    words: Iterable[str] = WORDS, *, bare: Iterable[str] = (), lowercase: bool = False
) -> PreTrainedTokenizerFast:
    """A byte-level tokenizer whose whole tokens are `words`, each with one space before it.

    The ids are: five special tokens, 256 bytes, the words in their order, the words of `bare` without a space
    (for what begins a line or follows a bracket). With `lowercase`, capitals are read as small letters, and only
    then does a text come back changed. `<|im_end|>` ends a text and `<|endoftext|>` pads. Raises UsageError for a
    word that is empty, holds a space, or stands twice, and for more than WORDS_MAX words.
    """
    words, bare = tuple(words), tuple(bare)
    _check(words)
    _check(bare)
    vocabulary = [
        *SPECIAL_TOKENS,
        *sorted(pre_tokenizers.ByteLevel.alphabet()),
        *(_form(word) for word in words),
        *(word for word in bare if len(word) > 1),  # one byte is a token already
    ]
    # ignore_merges: a piece that stands in the vocabulary is one token, and any other falls apart into bytes.
    model = BPE(
        vocab={token: number for number, token in enumerate(vocabulary)}, merges=[], ignore_merges=True
    )
    tokenizer = Tokenizer(model)
    if lowercase:
        tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(
        [AddedToken(token, special=True, normalized=False) for token in SPECIAL_TOKENS]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=None,
        eos_token=END,
        pad_token=PAD,
        extra_special_tokens={"image_token": IMAGE, "video_token": VIDEO},
        clean_up_tokenization_spaces=False,
        model_input_names=["input_ids", "attention_mask"],
    )


def _form(word: str) -> str:
    """How the byte-level alphabet writes the word with a space before it."""
    [(piece, _)] = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False).pre_tokenize_str(
        f" {word}"
    )
    return str(piece)


def _check(words: tuple[str, ...]) -> None:
    if len(words) > WORDS_MAX:
        raise UsageError(f"{len(words)} words are too many for a small tokenizer: at most {WORDS_MAX}")
    seen: set[str] = set()
    for word in words:
        if not word or word.split() != [word]:
            raise UsageError(f"{word!r} is not a word: give words without spaces")
        if word in seen:
            raise UsageError(f"the word {word!r} stands twice in the list")
        seen.add(word)
