// stories.cpp: endless simple English stories from a seeded grammar, so that a first training run needs no download.
//
//     g++ -O2 -std=c++17 data/stories.cpp -o build/stories
//     build/stories [--mb N] [--seed S] OUT.txt             16 MB and seed 1 unless said otherwise; tens of MB a second
//
// A story has a dozen to two dozen sentences: somebody wants something, something is in the way, somebody helps. A paragraph is one
// line, and an empty line ends a story. The text is ASCII and the same bytes for the same seed on any machine (own random numbers,
// integer weights); a shorter file is the beginning of a longer one. Names, things, places and spells come back many sentences
// after they were first mentioned, so that a model gains from a longer context.
//
// The entropy rate. Every probability that made the text is known, so we know how well the best possible model can do on it, which
// for a real corpus nobody knows. Each choice of an alternative with probability p costs -log2 p bits; their sum over the bytes
// written is printed at the end, in bits and in nats per byte (about 0.54 and 0.38). What that figure is, exactly:
//   - The sum is -log2 of the probability of the text's *derivation*, the list of choices that made it. The probability of the text
//     is a sum over all derivations that spell it, so the figure is an upper bound on -log2 P(text) / bytes. The two are equal if
//     no text has two derivations, and the grammar is written that way: alternatives of a rule differ in a word that is printed, a
//     list has no word twice (checked at the start), lists that compete for one place share no words, what is drawn is also shown.
//     Sampling every rule below whole plots 60,000 times, with lists cut to two words, found no text with two derivations; that is
//     evidence, not a proof.
//   - It is the figure of this very file. In the mean over files it is the source's entropy rate; at 16 MB, seeds scatter by
//     0.0003 bits.
//   - So it is the floor of the loss of any model that has not seen the text: over the whole file none beats it but by luck, in the
//     fourth digit (or by having memorised it). A part of the file, such as a held-out 1%, has a figure of its own, some 0.004 bits
//     off. A model whose window opens in mid-story, without the names and things that came before, stays above it even if perfect.
//
// The parts: random numbers, English inflection, the grammar (a small language, explained above its text), the compiler that turns
// that text into steps, the writer that walks them, and main.
#include <cctype>       // isalpha, isdigit
#include <cerrno>       // errno
#include <cmath>        // log2 and log, for the report only
#include <cstdint>
#include <cstdio>
#include <cstdlib>      // strtod, strtoull, exit
#include <cstring>      // strchr, strlen, strerror
#include <map>
#include <string>
#include <vector>

using std::string;

[[noreturn]] void fail(const string& what) {
    fprintf(stderr, "stories: %s\n", what.c_str());
    exit(2);
}

// -------------------------------------------------------------------------------------------------------------------------------
// Random numbers: splitmix64 (Steele, Lea and Flood 2014). A third of a page of code that gives the same bits everywhere, which
// <random>'s distributions do not promise.

struct Random {
    uint64_t state;

    uint32_t next() {
        uint64_t z = (state += 0x9E3779B97F4A7C15u);
        z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9u;
        z = (z ^ (z >> 27)) * 0x94D049BB133111EBu;
        return (uint32_t)((z ^ (z >> 31)) >> 32);
    }
    // Uniform in [0, n), exactly (Lemire 2019): the few low products that would favour some results are drawn again. Exactly,
    // because the entropy that we report counts on the probabilities being what the weights say.
    uint32_t below(uint32_t n) {
        for (;;) {
            uint64_t product = (uint64_t)next() * n;
            if ((uint32_t)product >= n || (uint32_t)product >= (0u - n) % n) return (uint32_t)(product >> 32);
        }
    }
};

// -------------------------------------------------------------------------------------------------------------------------------
// English. Lists hold base forms; everything else is derived here, once, when the grammar is compiled.

bool is_vowel(char c) { return c && strchr("aeiou", c); }
bool ends_with(const string& s, const char* tail) {
    size_t n = strlen(tail);
    return s.size() >= n && s.compare(s.size() - n, n, tail) == 0;
}
bool begins_with(const string& s, const char* head) { return s.compare(0, strlen(head), head) == 0; }

// "an" before a vowel sound: by letter, but for a silent h, and for a u or an o that sounds like a consonant.
bool takes_an(const char* word) {
    string w;
    for (int i = 0; word[i] && i < 5; i++) w += (char)(word[i] | 0x20);
    for (const char* silent : {"hour", "hones", "heir"}) if (begins_with(w, silent)) return true;
    for (const char* glide : {"uni", "use", "usu", "uku", "eu", "one", "once"}) if (begins_with(w, glide)) return false;
    return is_vowel(w[0]);
}

// Irregular words, as "base form form ...": past tense of verbs, plural of nouns. Only what the lists below can use.
string irregular(const char* const* table, const string& word) {
    for (; *table; table++) {
        string entry = *table;
        size_t space = entry.find(' ');
        if (entry.compare(0, space, word) == 0) return entry.substr(space + 1);
    }
    return "";
}

string noun_plural(const string& noun) {
    static const char* const table[] = {"mouse mice", "dormouse dormice", "goose geese", "ox oxen", "moose moose", "deer deer",
        "reindeer reindeer", "starfish starfish", "tooth teeth", "leaf leaves", "knife knives", "scarf scarves",
        "headscarf headscarves", "potato potatoes", "tomato tomatoes", "domino dominoes", nullptr};
    size_t of = noun.find(" of ");                                  // ball of string -> balls of string
    if (of != string::npos) return noun_plural(noun.substr(0, of)) + noun.substr(of);
    size_t last = noun.rfind(' ') == string::npos ? 0 : noun.rfind(' ') + 1;
    string head = noun.substr(0, last), w = noun.substr(last), odd = irregular(table, w);
    if (!odd.empty()) return head + odd;
    if (ends_with(w, "man")) return head + w.substr(0, w.size() - 3) + "men";
    if (ends_with(w, "s") || ends_with(w, "x") || ends_with(w, "ch") || ends_with(w, "sh")) return noun + "es";
    if (ends_with(w, "y") && !is_vowel(w[w.size() - 2])) return noun.substr(0, noun.size() - 1) + "ies";
    return noun + "s";
}

// stop -> stopped: one syllable (one group of vowels) that ends in one vowel and one consonant other than w, x, y.
bool doubles(const string& verb) {
    size_t n = verb.size();
    int groups = 0;
    for (size_t i = 0; i < n; i++) groups += is_vowel(verb[i]) && (i == 0 || !is_vowel(verb[i - 1]));
    if (groups > 1) return ends_with(verb, "el") || verb == "zigzag";   // British, like the lists: yodelled
    return n >= 3 && groups == 1 && !is_vowel(verb[n - 1]) && is_vowel(verb[n - 2]) && !is_vowel(verb[n - 3])
        && !strchr("wxy", verb[n - 1]);
}

enum Form : uint8_t { PLAIN, PLURAL, THIRD, PAST, GERUND, WORD_FORMS };

// One form of a word. Verbs carry their particles and objects behind them ("climb trees"), so it is the first word that changes.
string inflect(const string& word, Form form) {
    if (form == PLAIN) return word;
    if (form == PLURAL) return noun_plural(word);
    size_t end = word.find(' ') == string::npos ? word.size() : word.find(' ');
    string v = word.substr(0, end), rest = word.substr(end), stem = v.substr(0, v.size() - 1);
    bool y = ends_with(v, "y") && v.size() > 1 && !is_vowel(v[v.size() - 2]);
    if (form == THIRD) {
        if (v == "do" || v == "go" || ends_with(v, "s") || ends_with(v, "x") || ends_with(v, "ch") || ends_with(v, "sh"))
            return v + "es" + rest;
        return (y ? stem + "ies" : v + "s") + rest;
    }
    if (form == GERUND) {
        if (ends_with(v, "ie")) return v.substr(0, v.size() - 2) + "ying" + rest;
        if (ends_with(v, "e") && !ends_with(v, "ee")) return stem + "ing" + rest;
        return v + (doubles(v) ? string(1, v.back()) : "") + "ing" + rest;
    }
    static const char* const past[] = {"say said", "tell told", "go went", "run ran", "creep crept", "ride rode", "stride strode",
        "make made", "build built", "draw drew", "sing sang", "catch caught", "swim swam", "fly flew", "write wrote", "read read",
        "feed fed", "sweep swept", "keep kept", "find found", "dig dug", "throw threw", "blow blew", "sell sold", "hide hid",
        "lose lost", "slide slid", "sleep slept", "spin spun", "do did", "stand stood", "leap leapt", "shake shook", nullptr};
    string odd = irregular(past, v);
    if (!odd.empty()) return odd + rest;
    if (ends_with(v, "e")) return v + "d" + rest;
    return (y ? stem + "ied" : v + (doubles(v) ? string(1, v.back()) : "") + "ed") + rest;
}

// -------------------------------------------------------------------------------------------------------------------------------
// The grammar. A line "name:" opens a rule; its alternatives are the lines that follow, and what | separates on a line; a line set
// in by four continues the one above. The earlier an alternative stands, the likelier it is (see weigh). Within an alternative:
//
//     <rule>  <rule.form>      an alternative of that rule, drawn now; forms of words: pl, es (third person), past, ing
//     {a|b|}                   one of these, here possibly nothing
//     [name=rule]              draw now, print nothing, remember under that name: what comes back later in the story
//     $name  $name.form        print what is remembered; forms also he him his himself was, and I me my (the twins say we us our),
//                              by the gender and number of the word
//     %a                       a or an, as the next word requires; %A at the start of a sentence
//     <Rule>  $Name  $x.He     the same with a capital letter
//     #                        a new paragraph
//     word/f  word/m  word/p   in lists: female, male, plural, otherwise a thing; name/f: says it for a whole list
//     3* ...                   three times as likely as its place says
//
// A rule draws no alternative twice in a story before half of them are used up, unless its name ends in a star. Names that plots
// share: hero, kind (girl, fox), look and thing (what it is about), place (where it leads), pal (who helps), foe (who hinders),
// friend; ann, bob and cat own what the hero needs.
//
// The prose is denser in names, lists and odd things than a real book for children: each of them costs the reader bits. Plainer
// templates had 0.3 bits per byte, a floor so low that one learns little from watching a model fall towards it.

const char* const grammar_text =

// Words. Commonest first, by feel. Lists that compete for one place (toy, tool, small ...; state, colour, material, size) share none.
R"(
girl/f: Lily|Nora|Mia|Anna|Lucy|Rosa|Ella|Zoe|Maya|Ruby|Clara|Ivy|Emma|Tess|Molly|Ada|Greta|Sara|Hazel|Ida|Priya|Nina|Daisy|Yuki
  Elsie|Marta|Lena|Cora|Amira|Betty|Jane|Freya|Iris|Olga|Sofia|Tara|Mabel|Holly|Kate|Dora|Fatima|Gwen|Heidi|Josie|Kira|Lotta
  Maggie|Nell|Olive|Polly|Rita|Sadie|Tilda|Una|Vera|Willa|Yara|Zara|Agnes|Bella|Carmen|Edith|Flora|Gita|Hana|Ines|Jill|Leila|Mina
  Nadia|Opal|Paula|Ruth|Stella|Thea|Ursula|Wanda|Alma|Bridget|Celia|Della|Esther|Fern|Ginny|Hester|Inga|Judith|Lorna|Minnie|Abby
  Bea|Dilys|Eva|Fay|Gail|Hope|Isla|Joan|Kim|Liv|Meg
boy/m: Tom|Ben|Max|Sam|Leo|Tim|Jack|Finn|Oscar|Peter|Noah|Hugo|Emil|Otto|Omar|Luca|Felix|Oliver|Henry|George|Arthur|Jonas|Kofi
  Ravi|Ivan|Alfie|Ned|Karl|Theo|Marco|Billy|Hassan|Paul|Anton|Caleb|Danny|Eddie|Frank|Gus|Harry|Ian|Jasper|Kit|Lars|Martin|Nils
  Owen|Percy|Ralph|Simon|Toby|Victor|Walter|Yusuf|Albert|Bruno|Cyril|David|Ethan|Fred|Gilbert|Hector|Isaac|Jacob|Kenji|Liam|Miles
  Nico|Pablo|Quentin|Rory|Stefan|Ted|Wilf|Abel|Boris|Conrad|Diego|Edgar|Fergus|Gabriel|Humphrey|Jerome|Lewis|Magnus|Nigel|Rupert
  Axel|Bert|Cato|Dan|Erik|Gil|Hal|Igor|Jude|Levi|Mo|Nat
she_beast/f: Bramble|Pip|Clover|Tilly|Hoppity|Velvet|Mopsy|Twinkle|Peaches|Snowdrop|Honeypot|Dot|Tansy|Ginger|Patches|Sorrel
  Puddle|Freckles|Marigold|Nibbles|Blossom|Tuppence|Whisper|Juniper|Sable|Feather|Topsy|Hush|Bluebell|Cricket|Dapple|Echo|Fidget
  Gooseberry|Inky|Jinx|Mallow|Nutmeg|Pansy|Quill|Ripple|Saffron|Thimble|Violet|Wisp
he_beast/m: Rusty|Bumble|Rufus|Patch|Barnaby|Whiskers|Biscuit|Thunder|Bracken|Socks|Pepper|Grumble|Flint|Basil|Dusty|Chester
  Snuffles|Badge|Toggle|Bolt|Mossy|Pickle|Scruff|Tumble|Ash|Button|Hobnail|Wobble|Crumbs|Acorn|Bobbin|Copper|Domino|Ember|Fudge
  Gizmo|Hiccup|Jumble|Kipper|Lucky|Mumble|Noodle|Paddle|Rascal|Sniff
pair/p: the twins|the cousins|the two friends
beast: fox/m|rabbit/f|mouse/f|bear/m|owl/f|frog/m|hedgehog/m|squirrel/f|cat/f|duck/f|badger/m|otter/f|goat/f|pig/m|goose/f|mole/m
  beaver/m|donkey/m|crow/f|turtle/f|sparrow/f|hare/m|toad/m|hen/f|heron/m|deer/f|lamb/f|pony/f|raven/m|robin/m|magpie/f|stork/f
  weasel/m|swan/f|dormouse/f|parrot/m|lizard/m|raccoon/m|puppy/m|kitten/f|snail/m|moose/m|rooster/m|ferret/m|woodpecker/m
  porcupine/f|starling/f|newt/m|seal/f|crab/m|pelican/f|penguin/m|vole/f|shrew/f|marmot/m|lynx/m|elk/m|reindeer/f|camel/f
  giraffe/f|elephant/m|lion/m|tiger/f|panda/f|koala/f|kangaroo/f|wombat/m|armadillo/m|sloth/m|iguana/f|tortoise/m|hippo/f
  octopus/f|yak/m|ox/m|puffin/f|gecko/m|walrus/m|zebra/f|monkey/m|ostrich/f|ladybird/f|bee/f|grasshopper/m|moth/f|emu/m
job: farmer/m|baker/f|miller/m|teacher/f|tailor/m|gardener/f|fisherman/m|shepherd/f|shoemaker/m|blacksmith/f|carpenter/m|postman/m
  doctor/f|painter/f|cook/m|sailor/m|clockmaker/f|woodcutter/m|beekeeper/f|potter/m|weaver/f|librarian/f|grocer/m|ferryman/m
  juggler/f|toymaker/m|candlemaker/f|innkeeper/f|watchman/m|mayor/f|tinker/m|barber/m|magician/f|captain/f|pedlar/m|poet/m
  bricklayer/m|cheesemaker/f|plumber/f|chimney sweep/m|lighthouse keeper/m|piano tuner/f|basket weaver/m|hat maker/f|goatherd/m
  stonemason/m|seamstress/f|dentist/m|fiddler/m|nurse/f|butcher/m|king/m|queen/f|judge/f|organist/f|clown/m|astronomer/f
  bookbinder/m|florist/f|glassblower/m|hermit/m|inventor/f|knight/m|laundress/f|mapmaker/m|milkmaid/f|optician/m|pirate/m
  ringmaster/m|roofer/f|saddler/m|thatcher/m|tax collector/m|train driver/f|umbrella mender/m|violin maker/f|waiter/m|wizard/m
  witch/f|conductor/m|cobbler/m|acrobat/f|bell ringer/m|diver/f
kin_she/f: grandmother|aunt|mother|sister|cousin|godmother|great-aunt|niece|stepsister
kin_he/m: grandfather|uncle|father|brother|godfather|great-uncle|nephew|stepbrother
trait: kind|brave|clever|shy|curious|cheerful|gentle|stubborn|careful|lazy|proud|honest|quiet|noisy|playful|patient|greedy|polite
  bold|dreamy|merry|helpful|forgetful|thoughtful|grumpy|friendly|timid|lively|sensible|restless|generous|jolly|clumsy|cautious
  hopeful|silly|loyal|nosy|fussy|daring|modest|messy|tidy|chatty|impatient|bashful|plucky|sleepy|bossy|wise|nimble|sturdy|gruff
  solemn|artful|bookish|boastful|bouncy|brisk|calm|charming|cheeky|contrary|crafty|dainty|dashing|dozy|eager|fearless|fidgety
  fierce|frugal|giddy|graceful|haughty|hasty|hungry|jaunty|lonely|lucky|mild|moody|musical|mysterious|naughty|obliging|peaceful
  peculiar|perky|practical|prickly|punctual|reckless|rowdy|saucy|scruffy|serious|sly|spirited|stern|stout|studious|sweet|talkative
  trusting|upright|vain|wary|whimsical|wicked|witty|wily|zealous|cranky|earnest|gallant|humble|inventive|jovial|keen|learned|meek
  nervous|plump|ragged
glad: happy|glad|pleased|delighted|proud|cheerful|thankful|excited|relieved|content|overjoyed|grateful|joyful|thrilled|jubilant
  elated|lighthearted
sad: sad|unhappy|miserable|gloomy|lonely|sorry|heartbroken|upset|downcast|tearful|glum|disappointed|troubled|worried|wretched
  forlorn|low|crestfallen|dejected
afraid: afraid|scared|frightened|nervous|uneasy|terrified|alarmed|startled|anxious|jumpy|fearful|fidgety|pale
cross: angry|cross|furious|annoyed|sulky|jealous|indignant|offended|grumpy|prickly|vexed|bitter|sour
colour: red|blue|green|yellow|brown|white|black|grey|purple|pink|orange|golden|crimson|scarlet|violet|turquoise|cream|amber|russet
  lilac|ivory|mustard|maroon|lemon|indigo|peach|mauve|rust|teal|khaki|emerald|sapphire
material: wooden|silver|tin|glass|paper|copper|iron|brass|clay|leather|woollen|velvet|cardboard|stone|straw|wicker|pewter|bamboo
  china|felt|marble|satin|steel|rubber|bone|wax|cork|canvas|lace|chalk|bronze|oak|plaster|coral|crystal
size: little|big|small|tiny|large|long|huge|short|round|tall|narrow|wide|thin|square|fat|slender|vast|oval|squat|mighty|miniature
  bulky|pocket-sized|middling
state: old|shiny|new|dusty|broken|pretty|muddy|rusty|crooked|bright|heavy|plain|striped|spotted|battered|polished|dented|painted
  patched|smooth|rough|cracked|worn|fancy|clean|dirty|sparkling|carved|bent|chipped|wobbly|lopsided|dull|gleaming|sticky|scratched
  squeaky|light|hollow|handmade|glittering|wet|borrowed|unusual|elegant|ugly|odd|precious|mended|charred|cheap|comical|creaky|damp
  dotted|fragile|frosty|glossy|greasy|grubby|invisible|jagged|labelled|leaky|loose|magical|noisy|oily|ordinary|pointed|rare|ridged
  scented|secret|sharp|silent|slimy|sooty|speckled|spare|stolen|tangled|twisted|useless|valuable|waxed|antique|blunt|charmed|cold
  delicate|engraved|enormous|expensive|famous|flimsy|foreign|forgotten|gilded|glowing|haunted|hefty|lucky|lost|marvellous|matching
  musical|numbered|pearly|portable|queer|royal|ruined|sandy|shimmering|simple|splendid|splintered|stout|tarnished|unlucky
  upside-down|varnished|warped|weightless|wonderful|winding|well-made|well-known|curved|hammered|hand-painted|inherited|knotted
  lacquered|nickel-plated
taste: ripe|sweet|juicy|sour|hot|cold|crisp|burnt|fresh|stale|sticky|salted|sugared|squashed|roasted|boiled|fried|pickled|dried
  frozen|stuffed|peeled|sliced|mashed|buttered|baked|bitter|blackened|bruised|candied|crumbly|crunchy|delicious|floury|giant
  gingery|half-eaten|iced|minty|mouldy|nutty|overripe|peppery|rotten|rosy|salty|smoked|soft|soggy|spicy|steamed|syrupy|tasty
  tender|toasted|unripe|warm|wholesome|wrinkled|wild|plump|perfect|pink|golden|green|yellow
fit: striped|woollen|velvet|torn|patched|checked|tartan|flowery|faded|tight|baggy|silk|cotton|lace|leather|felt|embroidered|frayed
  fluffy|knitted|spotted|muddy|new|old|clean|shabby|silky|furry|feathery|frilly|pleated|buttonless|crumpled|rumpled|quilted
  tasselled|padded|itchy|fur-lined|sequinned|linen|tweed|tattered|outgrown|hand-sewn|moth-eaten|waterproof|winter|Sunday|borrowed
  ink-stained|rain-soaked|second-best|starched|thick|dotted|ragged|creased|scented|threadbare|reversible|zigzag|velveteen|corduroy
  paper|straw|darned|fringed|beaded|oilskin|satin|home-made|hooded|ribboned|see-through|stolen|stretchy|sparkling|musty
  fashionable
toy: whistle|kite|ball|bell|ring|drum|lantern|book|key|doll|map|flute|compass|watch|mirror|puppet|necklace|trumpet|locket
  telescope|music box|spinning top|mask|crown|teapot|umbrella|clock|fiddle|medal|cup|paintbrush|pen|vase|candlestick|tambourine
  bracelet|badge|brooch|rattle|hourglass|banjo|goblet|bugle|model ship|picture frame|bookmark|snow globe|yo-yo|sundial|inkwell
  jewel box|chess set|pocket knife|mouth organ|toy boat|pincushion|paperweight|puzzle|tea tray|harp|cello|accordion|gong|triangle
  hobby horse|rag doll|teddy bear|kaleidoscope|toy train|crystal ball|barometer|globe|diary|purse|earring|sceptre|sword|shield
  helmet|banner|flag|trophy|statue|carpet|quilt|birdcage|fishbowl|lampshade|camera|money box|sugar bowl|tankard|mandolin|lute
  abacus|weathervane
tool: rope|spade|hammer|ladder|broom|bucket|saw|stick|net|shovel|hook|fishing rod|wheelbarrow|rake|pole|crowbar|oar|plank|spoon
  frying pan|ladle|trowel|pitchfork|mop|rolling pin|tin opener|chisel|screwdriver|sieve|washing line|walking stick|blanket
  garden hose|pulley|tent peg|saucepan lid|coat hanger|watering can|butterfly net|toasting fork|boat hook|feather duster
  bicycle pump|flagpole|cushion|spanner|mallet|drill|dustpan|ironing board|deckchair|stool|trolley|parachute|catapult|megaphone
  foghorn|torch|tarpaulin|lasso|wedge|corkscrew|nutcracker|whisk|kettle|paddle|anchor|plough|hoe|thermometer|ruler|funnel
  bellows pipe|clamp|grindstone|hatstand|tape measure|trapeze|winch
wear: hat|coat|scarf|apron|jacket|shirt|cap|cloak|dress|waistcoat|jumper|bonnet|shawl|raincoat|bow tie|belt|sash|cardigan
  nightgown|cape|tunic|vest|kilt|turban|beret|top hat|veil|poncho|overcoat|collar|smock|uniform|kimono|wig|blazer|sou'wester
  pinafore|headscarf|ruff|toga
footwear: sock|boot|slipper|mitten|glove|shoe|sandal|clog|stocking|button|buckle|pocket|bootlace|zip|hatpin|shoehorn|earmuff|hood
fruit: apple|pear|plum|cherry|carrot|egg|biscuit|nut|potato|turnip|onion|bun|muffin|pancake|tomato|peach|radish|strawberry
  mushroom|walnut|chestnut|fig|apricot|sausage|cabbage|beetroot|lemon|banana|pumpkin|cucumber|raspberry|blackberry|almond|waffle
  pretzel|gherkin|parsnip|leek|hazelnut|toffee|gooseberry|quince|artichoke|melon|blueberry|scone|oatcake|doughnut|olive|grape
  raisin|coconut|pineapple|mango|clementine|pepper|marrow|pasty|meatball|crumpet|bagel|meringue|macaroon|lollipop|peppermint
  marshmallow|caramel|truffle|shallot|mulberry|cranberry|noodle|omelette|croissant
spread: honey|soup|jam|porridge|butter|stew|custard|syrup|cream|broth|marmalade|gravy|jelly|rice|treacle|yoghurt|chutney|fudge
  mustard|oatmeal|lentils|beans|fishpaste|sauerkraut|goulash|trifle|semolina
drink: milk|tea|cocoa|juice|lemonade|cider|water|ginger beer|barley water|buttermilk|nettle tea|coffee|punch|rose water|plum juice
  root beer|mead
small: feather|stone|stamp|leaf|pine cone|bottle top|bead|cork|pebble|postcard|beetle|cotton reel|wishbone|nail|fishbone|matchbox
  chess piece|playing card|doorknob|tin soldier|peppercorn|candle|pencil|sea urchin|acorn|conker|seed|marble|coin|shell|ribbon
  thimble|ticket|needle|hairpin|hinge|screw|spring|tassel|sequin|starfish|eggshell|twig|magnet|shoelace|safety pin|paper clip
  curtain ring|sugar lump|tooth|whisker|horseshoe|arrowhead|fossil|icicle|snowball|cobweb|nest|quill|lump of coal|ball of string
  scrap of paper|bar of soap|photograph|napkin|fish hook|cog|teaspoon|egg cup|saucer|tea bag|letter|poem|riddle|recipe|bone|bubble
  clay pipe|domino|envelope|flowerpot|golf ball|jam jar|keyhole|lens|light bulb|locket chain|newspaper|paper bag|pipe cleaner
  puddle|rosette|sponge|splinter|sweet wrapper|tadpole|thermos|valentine|violin string|walking boot
flower: daisy|rose|tulip|poppy|thistle|fern|bluebell|buttercup|daffodil|violet|lily|nettle|primrose|dandelion|sunflower|foxglove
  crocus|marigold|snowdrop|hollyhock|pansy|iris|cowslip|cornflower|lupin|dahlia|aster|begonia|geranium|hyacinth|lavender bush
  orchid|peony|petunia|teasel
tree: oak|apple tree|pine|willow|birch|beech|pear tree|elm|cherry tree|fir|poplar|hazel bush|plum tree|maple|yew|alder|holly bush
  lime tree|rowan|hawthorn|spruce|ash tree|mulberry tree|cedar|fig tree|larch|aspen|cypress|hornbeam|palm tree|monkey puzzle
  sycamore|quince tree|redwood
leafy: old|tall|hollow|crooked|shady|leafy|bare|young|bent|mossy|gnarled|lonely|blossoming|evergreen|dead|dripping|ivy-covered
  lopsided|rustling|spreading|stunted|thorny|twisted|windblown|ancient|golden|weeping|slender|mighty|forked|sturdy|snow-covered
  lightning-struck|knotty|fragrant|whispering|huge|creaking|grey|solitary
bird: swallow|blackbird|thrush|finch|wren|lark|pigeon|seagull|cuckoo|jackdaw|wagtail|kingfisher|nightingale|swift|dove|bullfinch
  curlew|goldfinch|plover|rook
furniture: bed|stove|table|cupboard|sofa|bookcase|chest|bath|dresser|piano|armchair|sink|staircase|wardrobe|rug|washtub
  coal scuttle|woodpile|pantry door|bread bin|mantelpiece|spinning wheel|rocking chair|umbrella stand|doormat|sewing machine
  clothes basket|cradle|cuckoo clock|footstool|window seat|butter churn|laundry basket|linen chest|mangle|mattress|organ
  writing desk|rain barrel|henhouse|compost heap|beehive|garden roller|dog kennel|bird bath
bag: basket|bag|sack|satchel|rucksack|box|suitcase|handcart|knapsack|bundle|saddlebag|hamper|picnic basket|hatbox|pillowcase|trunk
  briefcase|biscuit tin|barrel|crate|drawer|pail|cauldron|wagon
place: forest|river|hill|mill|pond|market|bridge|well|barn|lake|beach|meadow|orchard|castle|church|mountain|cave|harbour
  lighthouse|school|garden|windmill|waterfall|railway|tower|swamp|quarry|inn|stable|vineyard|library|crossroads|cornfield|marsh
  fountain|ruin|greenhouse|valley|canal|bandstand|farm|sawmill|dairy|toll gate|sheepfold|boathouse|jetty|clearing|hayloft|dovecote
  bell tower|millpond|heath|old wall|brickworks|duck pond|weir|ferry|smithy|chapel|observatory|hop field|aqueduct|archway|bog
  circus|cliff|coal shed|common|ditch|dunes|fairground|fort|glacier|gorge|graveyard|iceberg|island|maze|moor|oasis|palace|park
  pier|playground|potato field|racecourse|reef|rose garden|sandpit|seawall|signal box|stone circle|tunnel|volcano|wharf
spot: old|dark|quiet|green|windy|empty|steep|misty|sunny|lonely|sleepy|busy|crooked|wild|mossy|shady|deserted|overgrown|crumbling
  little|famous|muddy|silent|chilly|pleasant|gloomy|haunted|great|whitewashed|ivy-covered|ancient|peaceful|dusty|stony|draughty
  flooded|foggy|leafy|narrow|abandoned|beautiful|bleak|bustling|charming|derelict|distant|enchanted|far-off|forgotten|frozen|grand
  grassy|hidden|humble|lofty|marshy|mysterious|nameless|neat|noisy|picturesque|private|rambling|red-roofed|royal|sandy|sheltered
  slippery|smoky|snowy|sunken|tidy|tumbledown|upper|weedy|wooded
path*: path|road|lane|track|hill|slope|valley|footpath|bank|hillside|cart track|alley|towpath|bridleway|avenue|stairs|terrace
  gully
dwelling: cottage|house|hut|farmhouse|cabin|tower|caravan|barge|mill|tent|lodge|tree house|bungalow|houseboat|attic|wagon|shed
  cellar|gatehouse|palace|igloo|teapot|lighthouse|shoe box|windmill|burrow|greenhouse|railway carriage|barrel|castle|chapel|stable
shop: bakery|post office|sweet shop|bookshop|toy shop|tea room|forge|bicycle shop|cheese shop|barber's shop|fish market|pottery
  chemist's|flower stall|hat shop|clock shop|music shop|button shop|laundry|town hall|railway station|fire station|theatre|museum
  boatyard|candle works|bank|kite shop|pie shop|spoon factory|umbrella shop|wool shop|map shop|mirror shop|jam factory
  puppet theatre|police station|ticket office
town_a*: Thistle|Bramble|Apple|Willow|Mill|Fox|Oak|Stone|Honey|Raven|Clover|Ash|Barley|Otter|Silver|Marsh|Hazel|Goose|Elder|Winter
  Copper|Plum|Swan|Butter|Heather|Long|Dove|Kettle|Rush|Pepper|Candle|Moor|Bell|Crab|Summer|Badger|Wool|Salt|Fern|Cherry|Hollow
  Nettle|Black|Green|High|Lark|Cold|Sandy|Gold|Hare|Iron|Jack|King|Lamb|Mid|North|Pin|Queen|Red|Sedge|Tan|Under|Wind|Yarrow|Bishop
  Corn|Drum|Ember|Frog|Gander
town_b*: ford|wick|ton|field|dale|bury|ham|down|well|brook|combe|stead|mouth|bridge|ley|worth|haven|gate|cliff|holt|water|hurst
  thorpe|mere|burn|church|cote|den|fold|garth|grove|hill|hope|kirk|pool|port|shaw|stow|toft|wood
name_b*: by|bottom|foot|nose|man|worthy|kin|son|berry|smith|croft|tree|whistle|top|cap|button|good|leaf|penny|shoe|sock|tail|more
  wright|spoon|pot|bird
sound*: ba|bim|bo|boo|chi|da|dee|di|do|doo|fa|fee|fi|fol|gum|hey|ho|jig|ka|ki|la|lo|loo|ma|mi|moo|na|ni|no|pa|pim|pom|ra|ri|ro|ru
  sha|sil|so|ta|tam|ti|tok|tra|tum|va|vi|wa|whe|yo|za|zi|zoo|bel|cor|dan|fen|gar|hum|kin|lum|mor|nim|pol|rin|san|tal|vor|wim|zen
weather: sunny|windy|rainy|snowy|cold|warm|foggy|frosty|stormy|cloudy|bright|chilly|misty|grey|hot|drizzly|breezy|crisp|icy|mild
  damp|blustery|dull|golden|still|sultry|showery|raw|balmy|glorious|gusty|hazy|bitter|clear|dismal|dry|gloomy|lovely|moonlit|muggy
  pale|perfect|silvery|soggy|squally|thundery|wet|wild
daypart*: morning|day|afternoon|evening
weekday*: Monday|Tuesday|Wednesday|Thursday|Friday|Saturday|Sunday
month*: January|February|March|April|May|June|July|August|September|October|November|December
few*: two|three|four|five|six|seven|eight|nine|ten|eleven|twelve|a dozen|twenty
five*: 0|1|2|3|4|5
digit*: 1|2|3|4|5|6|7|8|9
last*: 0|1|2|3|4|5|6|7|8|9
hobby: climb trees|skip stones|draw maps|sing|tell stories|fly kites|bake|build dams|read|whistle|paint|count stars|dig holes
  make lists|play the flute|keep secrets|write letters|knit|swim|watch clouds|learn riddles|stand on one leg|roll down hills
  feed the ducks|do cartwheels|dance in puddles|hunt for fossils|spin tops|race snails|name the stars|fold paper boats
  guess the weather|ask questions|sweep leaves|sleep late|argue|snore|yodel|hum|dive|skate|fish|sneeze|daydream|climb walls
  blow bubbles|do sums|pick mushrooms|play chess|tell jokes|tie knots|walk backwards|write poems|tap-dance|juggle|hop|giggle|boast
  sunbathe
act: collect|paint|mend|draw|hide|count|juggle|polish|weigh|wash|sell|swap|carve|bury|find|lose|label|stack|sort|balance|dry
  admire|borrow|throw|catch|decorate|wrap|measure|roll|kick|toast|sketch|spin|drop|repair|dust|trade|peel|chase|cook|sniff|knit
  study|carry|tickle|frame|guard|rescue|fold|invent|scrub|sew|shake
walk: walk|run|go|hurry|skip|march|creep|wander|climb|trot|stroll|dash|hop|tiptoe|race|trudge|stumble|hike|scurry|plod|sprint|limp
  dance|scramble|rush|gallop|tramp|shuffle|stride|amble|sneak|jog|waddle|roam|scamper|ramble|toil|saunter|bound|hasten|splash
  bounce|crawl|cycle|dart|glide|hobble|leap|lope|lumber|meander|pad|parade|potter|prance|ride|sail|skate|slide|slither|stagger
  stalk|strut|swagger|totter|traipse|tumble|whirl|zigzag|zoom
say*: say|cry|answer|reply|call|whisper|laugh|shout|mutter|exclaim|sigh|murmur|explain|declare|announce|squeak|mumble|gasp|chuckle
  grunt|stammer|add|bellow|croak|giggle|growl|grumble|hiss|howl|insist|lisp|moan|remark|roar|snap|sniff|sob|splutter|wail|warble
  yawn|yell
ask*: ask|wonder|inquire|demand|whisper
adverb: quickly|quietly|slowly|softly|happily|carefully|gently|loudly|sadly|proudly|bravely|kindly|eagerly|politely|gladly
  nervously|calmly|cheerfully|crossly|shyly|sleepily|gruffly|anxiously|patiently|merrily|warmly|firmly|briskly|wearily|boldly
  gravely|timidly|hopefully|sternly|thoughtfully|breathlessly|earnestly|dreamily|stiffly|solemnly|hoarsely|sheepishly|brightly
  grandly|curiously|fondly|modestly|doubtfully|absently|airily|bitterly|bluntly|coldly|coolly|cosily|dolefully|drily|faintly
  feebly|fiercely|frankly|glumly|gracefully|grimly|haughtily|humbly|idly|innocently|jauntily|joyfully|kindheartedly|lamely|lazily
  loftily|lovingly|meekly|mildly|moodily|pleasantly|primly|ruefully|serenely|severely|sharply|simply|sweetly|tartly|tenderly
  vaguely|wildly|wisely
pity*: Oh dear|Oh no|Goodness|Dear me|Good heavens|Bother|Help|Alas|Good gracious|What a pity|This is terrible|Whatever next
  Botheration|Woe is me|Stars above|How dreadful|Fiddlesticks|Mercy|Crumbs|Drat|Great snakes|Horrors|Not again|Oh, what bad luck
  Rats|Thunder and turnips|Well, I never|Just my luck
)"

// Phrases. Names again and again instead of pronouns would be dull, and pronouns alone unclear: <he> takes either.
R"(
he*: 2* $hero.he|$hero
girl_kind: girl
boy_kind: boy
daypart_one*: morning|afternoon|evening|night
name*: 4* <girl>|5* <boy>|<she_beast>|<he_beast>
surname*: <town_a><name_b>
look*: 5* <state>|<colour>|<material>|<size>
looks*: 2* <look>|2* <state>, <state>|<size> <colour>|<state> <material>|<colour> <material>|<size>, <state>
garb*: <fit> <wear>|<colour> <wear>|<fit> <colour> <wear>|<fit>, <fit> <wear>
kin*: <kin_she>|<kin_he>
relative*: <kin_she> <girl>|<kin_he> <boy>
object*: 3* <small>|3* <toy>|3* <tool>|<footwear>
objects*: 3* <small.pl>|3* <toy.pl>|3* <tool.pl>|<footwear.pl>
item*: 4* <looks> <object>|<fit> <wear>|<taste> <fruit>
items*: 4* <look> <objects>|<fit> <wear.pl>|<taste> <fruit.pl>
count*: 3* <few>|2* <digit><last>
find*: 2* %a <item>|<count> <items>
food*: %a <taste> <fruit>|<count> <taste> <fruit.pl>|%a <jar> of <spread>|%a <fruit> <baked>|%a <bottle> of <drink>
song*: <Sound>-<sound>-<sound>, <sound>-<sound>-<sound>|<Sound>-<sound>-<sound>
  <Sound>-<sound>, <sound>-<sound>, <sound>-<sound>-<sound>
jar*: jar|pot|bowl|tin|crock|tub|bucket|spoon
bottle*: cup|mug|jug|flask|bottle|glass|pitcher|thimbleful
baked*: pie|cake|tart|pudding|loaf|flan|crumble|turnover|dumpling|sandwich
doing*: 5* <act.ing> <items>|<hobby.ing>|humming '<song>'
did*: 5* <act.past> <items>|<hobby.past>|sang '<song>'
does*: 5* <act.es> <items>|<hobby.es>
todo*: 5* <act> <items>|<hobby>
being*: 3* %a <traits> <beast>|3* %a <traits> <job>|<name> the <job>|<name> the <beast>|<mr> <surname>
mr*: Mr.|Mrs.|Miss|old|Doctor|Captain|Aunt|little
sight*: <being>|<being> <doing>|<being> with <find>|<count> <trait> <beast.pl>|<being> in %a <garb>|<count> <bird.pl> <doing>
traits*: 2* <trait>|<trait>, <trait>|<trait> and <trait>
near*: near|by|beside|behind|beyond|opposite|above|below|not far from|past|round|over|just past|outside
under*: under|behind|beside|next to|on top of|in front of|inside
town*: <town_a><town_b>
where*: <near> the <spot> <place>|<near> the <place> of <town>|<near> the <spot>, <spot> <place>|under %a <leafy> <tree>
  among the <flower.pl>|<near> the <shop>|in <town>
home*: in %a <looks> <dwelling> <near> the <spot> <place>|above the <shop> in <town>|in %a <looks> <dwelling> full of <items>
  at <digit><last> <town_a> Lane, <near> the <shop>|<near> the <spot> <place> of <town>
  in the <shop> at <town>, with <find> and <find>
once*: once upon a time|long ago|once|a long time ago|<digit><last> years ago|one year|in the old days
  when <beast.pl> still wore <fit> <wear.pl>|when <town> was a village|in the year of the <weather> <month>
  in the <weather> days of <name> the <trait>|before anybody had thought of <doing>
sky: the wind <howl.past> {in|round|through} the <tree.pl>|rain {drummed|tapped|pattered} on the <dwelling>
  the sun shone on <digit><last> <flower.pl>|the <flower.pl> were {out|in bloom}
  the <bird.pl> were {quarrelling|busy|singing} in the <tree.pl>|fog {hid|had swallowed} the <place>
  the clouds looked like <trait> <beast.pl>|the air smelled of <spread>|the <job> was still <doing>
  the moon hung over <town> like %a <look> <toy>|the <place> was <colour> with {frost|dew|mist|dust}|all <town> was <doing>
howl*: howl|whistle|sing|sigh|moan|whisper|hum|roar
day:
  One <weather> <daypart>{ in <month>|},
  One <weather> <weekday>, when <sky>,
  On %a <weather> <weekday>{ in <month>| morning| afternoon| evening|},
  One <weather> <daypart>, while <being> <did>,
  At <digit>:<five><last> one <weather> <weekday>,
  On the {first|second|third|last} <weather> <weekday> of <month>,
  On the <daypart> of the <weather> <town> fair,
  One <weather> <daypart>, when <he> $hero.was <doing>,
  One <month> <daypart>, after a {breakfast|lunch|supper} of <food> and <food>,
like*: like %a <trait> <beast>|as fast as %a <trait> <beast>|as <adverb> as <count> <trait> <beast.pl>
  like %a <job> with %a <item>|like %a <item> in the wind
greet*: Good <daypart>|Hello|Hello there|Well met|Hey there|Mind your head|Welcome|Who goes there|Why, hello|Halt|Ahoy|Psst
  Excuse me
)"

// Sentences that any story can use: beginnings, habits, roads, meetings.
R"(
start*: <two>|6* <single>
single*:
  6* [hero=girl][kind=girl_kind]<intro> <habit> <habit>{ <habit>|}
  7* [hero=boy][kind=boy_kind]<intro> <habit> <habit>{ <habit>|}
  6* [hero=she_beast][kind=beast]<intro> <habit> <habit>{ <habit>|}
  7* [hero=he_beast][kind=beast]<intro> <habit> <habit>{ <habit>|}
two*: [one=girl][other=boy][hero=pair]<intro_pair> <habit>{ <habit>|}
intro*:
  2* <Once>, there {lived|was} %a <traits> $kind {called|named} $hero{, who {loved|liked|dreamed of} <doing>|}.
  2* $Hero was %a <traits> $kind who lived <home>.
  In {the village of |}<town>, <near> the <spot> <place>, lived %a <traits> $kind {called|named} $hero.
  There was {once |}%a <traits> $kind {called|named} $hero, who lived {with $hero.his <trait> <relative> |}<home>.
  {Everybody|Everyone} in <town> knew $hero, the <trait> $kind from the <shop>.
  $Hero the $kind was <trait>, <trait> and {very|rather|not very|a little} <trait>, and lived <home>.
  <Once>, %a <traits> $kind {called|named} $hero lived <home>.
  This is {a|the} story {about|of} %a <traits> $kind {called|named} $hero, %a <trait> <beast> and <find>.
intro_pair*:
  <Once>, two <trait> children, $one and $other, lived <home>, and people called them $hero.
  $One and $other were {both |}<trait> and {always|never} <trait>. They lived <home>, and {the neighbours|<name> the <job>} called
    them $hero.
  $One was <trait>, $other was <trait>, and both of them {loved|liked} <doing>. In <town> they were known as $hero.
habit:
  <He> {loved|liked|was fond of} <doing>, <doing> and {above all|especially|even} <doing>.
  Every <daypart> <he> <did>, <did> and {afterwards |}<did>.
  <He> $hero.was {very |}good at <doing> but {bad|hopeless} at <doing>.
  <He> always wore %a <garb> and carried <find> and <find> in %a <look> <bag>.
  For {breakfast|lunch|supper} <he> {ate|had} <food>, <food> and {sometimes |}<food>.
  <He> kept %a <trait> <beast> {called|named} <name>, who ate {only|nothing but} <taste> <fruit.pl> and <spread>.
  <He> {wanted|hoped} to be %a <job>, or {perhaps|at least} %a <job> with <find>.
  {Outside|Behind|Round} $hero.his <dwelling> {grew|stood} <count> <leafy> <tree.pl> and <count> <flower.pl>.
  $Hero.His <relative>, %a <trait> <job>, <did> on <weekday.pl>{ in %a <garb>|}.
  When it was <weather>, <he> <did>; when it was <weather>, <he> <did>.
  $Hero.His friends were <name>, <name>, <name> and %a <trait> <beast> called <name>.
  On the wall hung %a <item>, %a <item> and a picture of <being> <doing>.
  %A <look> clock by the <furniture> {sang|struck} "<song>" at <digit>:<five><last>, and <he> sang back, "<song>."
  <He> had taught $hero.himself to <todo>, to <todo> and, {after|in} <digit><last> {days|weeks}, to <todo>.
  {Every night|On <weekday.pl>} <name>, <name> and <name> came, {with|bringing} <food>, <food> and <find>.
  Under the <furniture> <he> kept <find>, <find> and <find>.
  <He> could count to <digit><last><last> and spell '<look> <object>', but {could not|never learned to} <todo>.
journey:
  <He> <walk.past> past the <spot> <place>, {over|through|across} the <spot> <place> and {up|down} the <path> to <town>.
  On the way <he> {passed|saw|met|counted} <sight>, <sight> and <sight>.
  <He> <walk.past> {under|between|past} <count> <leafy> <tree.pl> <like>.
  The <path> {led|wound|ran|twisted} past <sight>, and <he> <walk.past> on <adverb>.
  It was a {long|lonely|muddy|merry|strange} way, and <he> ate <food>, <food> and <food> and thought of <doing>.
  {At|By|Behind} the <spot> <place> <he> {rested|stopped} and shared <food> with <sight>.
  <He> <walk.past> through <town>, <town> and <town>, where <being> was <doing>.
  {Over|Above} the <place> circled <count> <bird.pl>, and {in|near} the <place> %a <trait> <beast> <did>.
  {Down|Up} the <path> <he> <walk.past>, and <being> <walk.past> {behind|beside|ahead}, <doing>.
  In <town> <name> sold <items>, <items> and <items> at <digit><last> pennies each, and <he> bought %a <taste> <fruit>.
  "<Song>," sang <count> <trait> <beast.pl> {on the <path>|in the <tree.pl>}, and %a <trait> <beast> sang, "<Song>."
  It was <digit><last> miles to <town>, then <digit> more past %a <look> <dwelling>, where <name> the <job> {lived|waved}.
who*: <beast>|<job>
comes:
  [pal=who]{Just then|At that moment|Luckily|By good luck|Suddenly} %a <traits> $pal <walk.past> {by|along|out of the <place>},
    carrying <find>.
  [pal=who]"<Greet>!" said %a <trait> voice. It was %a $pal {with|carrying} %a <item>.
  [pal=who]Under %a <leafy> <tree> sat %a <traits> $pal in %a <garb>, eating <food>.
  [pal=who]<He> {met|came upon|bumped into} %a <traits> $pal who was <doing>.
  [pal=who]{Near|Behind|Beside} the <spot> <place> stood %a <traits> $pal with <find> and <find>.
  [pal=who]Something <sneeze.past> {in|behind} the <flower.pl>, and out <walk.past> %a <traits> $pal in %a <garb>, with <find>.
sneeze*: sneeze|cough|laugh|move|rustle|snore|hiccup
asks:
  "{What is the matter|What is wrong|Why so <sad>|Can I help|Are you lost|What has happened}?" <ask.past> the $pal{ <adverb>|},
    <doing>.
  "{You look|You are} <sad>," <say.past> the $pal{ <adverb>|}. "{Have|Take} <food> and <food>, and tell me all."
  "I am {busy|tired of} <doing>," <say.past> the $pal{ <adverb>|}, "but {go on|tell me|I am listening}."
  The $pal {offered|gave} $hero.him <food>, {put down|admired} <find> and listened <adverb>.
  {So|And} <he> told $pal.him {everything|all about it}, and the $pal <did> and <say.past>, "I see."
thanks:
  "Thank you!" <say.past> $hero{ <adverb>|}, and gave the $pal <food>, <find> and <find>.
  $Hero thanked the $pal <adverb> and promised $pal.him <food>, <food> or else <find>.
  "How can $hero.I thank you?" {asked $hero|$hero <ask.past>}. "With <food>," <say.past> the $pal{ <adverb>|}, "and <find>."
  "{Come|Come along} with $hero.me, $pal," <say.past> $hero <adverb>, and together they <walk.past> {on|down the <path>}, <doing>.
)"

// Something in the way, and someone to get past it. Each hurdle names its helper, the pal, and its own way out.
R"(
try:
  First <he> {pushed|poked|tried} with %a <look> [tool=tool]$tool, but the $tool {bent|broke|slipped|snapped|fell in|got stuck}.
  <He> tried <count> times, with %a <item>, %a <item> and {even |}<find>.
  <He> looked in $hero.his <bag>, but there was nothing but <find>, <find> and <find>.
  <He> called for help, but only <being>, who was <doing>, {answered|looked up|yawned}.
  "{If only|I wish} $hero.I had %a <item>," <say.past> $hero{ <adverb>|}, but there was nothing but <find>.
  <He> sat down {under %a <leafy> <tree>|beside <sight>} and thought <adverb> of <food>.
  "<Pity>!" <say.past> $hero{ <adverb>|}. "Oh, for %a <item>!"
  <name>, <name> and <name> <walk.past> by, but {none of them|nobody} had %a <look> <object>.
hurdle:
  But the {river|stream} was {high|wild|wide|cold|deep}, and {the bridge was {broken|gone}|the <job> had {shut|painted} the
    bridge}. <stuck> The $pal laid %a <looks> {plank|ladder|door|table} across the water, and $hero <walk.past> over <adverb>.
  But a {fallen|huge} <tree> lay across the <path>. <stuck> The $pal fetched %a <look> <tool> and <count> <trait> <beast.pl>, and
    {all together|with one heave} they rolled the <tree> into the <place>.
  Then {fog|mist|darkness} came {down|up from the <place>}, and $hero could not see the <path>. <stuck> The $pal {lit|held up} %a
    <looks> {lamp|lantern|candle}, and they <walk.past> <adverb> past the <spot> <place>.
  But the gate {by|at} the <spot> <place> was locked, and the key was {gone|lost|rusty}. <stuck> The $pal <walk.past>
    {under|over|through} the gate and opened it <adverb> with %a <item>.
  But the <path> became {too|so} {steep|muddy|slippery|stony} for {even |}%a <trait> <beast>. <stuck> The $pal knew another way,
    {past|through|round} the <spot> <place> and {up|down} <digit><last><last> <look> steps.
  {But|Then} %a <size> [guard=guard_beast]$guard {lay|sat} in the <path> and would not {move|budge}. <stuck> The $pal gave the
    $guard <food>, and it <walk.past> <adverb> {away|into the <place>}.
  Then $hero.his <bag> {tore|burst|split}, and out fell <find>, <find> and <food>. <stuck> The $pal {sewed|tied|patched} {it|the
    hole} <adverb> with %a <looks> {ribbon|thread|shoelace}.
  Then {snow|a storm|rain|hail} {began|came}, and {soon|in no time} $hero $hero.was {wet|cold|shivering|frozen}. <stuck> The $pal
    took $hero.him into %a <looks> <dwelling> and served <food>, <food> and <food>.
  {But|Then} the <path> split in two, and {the signpost said only "<town>"|both ways looked <spot>}. <stuck> "{Left|Right}, past
    the <spot> <place>," <say.past> the $pal <adverb>, "{left|right|straight on} at the <place>, and ask for <mr> <surname>."
stuck*: <comes> <asks>|<try> <comes>|<try> <comes> <asks>|<pause> <comes>
pause:
  "<Pity>!" <say.past> $hero{ <adverb>|}.
  $Hero $hero.was as <sad> as %a <item> or %a <item>.
  "<Pity>," <say.past> $hero. "{And it is only <weekday>|And $hero.I only have <food>|What would <name> do|Where is <name>}!"
  {Nobody|No one} was about but <sight> and <sight>.
guard_beast: dog|bull|boar|gander|billy goat|ram|tomcat|wolf|mule|cow|turkey|crocodile|rhinoceros|buffalo|hound|peacock
)"

// How things end.
R"(
finish*: <feast> <ending>|<feast> <feast> <ending>|<ending>
feast:
  That <daypart_one> they {ate|had|shared} <food>, <food> and <food>.
  The table held <food>, <food>, <food> and {even |}<food>.
  $Hero.His <kin> brought <food> and <food>, and {everyone|even the <job>} had {a piece|some|a second helping}.
  They danced {round the <tree>|in the <place>}, and <sight> {joined in|came to watch}.
  <name> played the <toy>, <name> {sang|clapped}, and <being> <did>.
  The guests were <name>, <name>, <name>, <being> and <being>.
  The {band|<beast.pl>|<job.pl>} {played|sang} "<song>, my <look> <object>, <song>" {till|until} <weekday>.
ending:
  {From that day on|After that|Ever after|From then on}, $hero $hero.was {less|more|a little less|a little more} <trait>, and
    <did> every <weekday>.
  That night $hero dreamed of <sight> and <sight>.
  And on {every|any} <weather> <weekday> you {may|can} still {see|meet} $hero <where>, <doing>.
  $Hero never forgot that <weather> <daypart>, nor the <look> <object>, nor the <trait> <beast>.
  "{Tomorrow|Next time|On <weekday>}," <say.past> $hero <adverb>, "$hero.I will {bring|pack|take} <food> and %a <item>."
  And <he> $hero.was <glad> {ever after|until the next <weather> <weekday>|for <digit><last> years}, <doing> and <doing>.
  {Whenever|When} it was <weather>, <he> thought of <being> and <did>.
  $Hero went to bed <glad>, with %a <look> <small> under the pillow and %a <trait> <beast> at the door.
)"

// The plots. Whatever is remembered at the head of a plot is sure to be printed further down: a choice that does not show would
// cost bits that no reader could ever guess back.
R"(
story*: <week>|<museum>|<lost>|<present>|<letters>|<errand>|<making>|<contest>|<stray>|<quarrel>|<trade>|<wish>
friend*: <girl>|<boy>
look_toy*: <look> <toy>
look_tool*: <look> <tool>
look_wear*: <fit> <wear>
cake*: <fruit> <baked>
strange*: <Sound><sound><sound>|<Sound><sound>

// Something dear is gone; a witness saw who took it; the thief has a reason, and is forgiven.
lost*:
  [look=state][thing=toy][place=place][foe=thief]<start> <treasure> # <day> <gone> <search> # <seen> <journey> # <caught> <excuse>
    <mercy> # <finish>
thief: jackdaw/m|rat/m|stoat/f|goblin/m|pixie/f|gnome/m|jay/f|chipmunk/m|imp/m|hamster/f|giant/m|troll/m|ghost/f|burglar/m
  baby dragon/m|polecat/m|ogre/m|mermaid/f
treasure:
  $Hero.His {dearest|finest|best} thing was %a $look $thing, {a present from|made by|once lost by} <being>.
  $Hero owned <find>, <find> and %a $look $thing, and loved the $thing most.
  For $hero.his birthday <he> $hero.was given <find>, <find>, <find> and, best of all, %a $look $thing.
  {At|By} the <spot> <place> $hero had found %a $look $thing, and kept it <under> the <furniture>, wrapped in %a <garb>.
  {Years ago|One <month>} <being> had given $hero %a $look $thing in return for <find> and <food>.
gone:
  $hero {looked|reached} <under> the <furniture> for the $thing, but there was nothing but <find>.
  <he> <walk.past> home from the <spot> <place>, and the $look $thing was gone, and so was %a <item>.
  <he> put the $thing down to eat <food>, and when <he> looked {up|back|again} there was nothing but <find>.
  <he> went to {play with|polish|fetch} the $look $thing, but someone had taken it and left <find>.
search:
  <He> {looked|searched|hunted} <under> the <furniture>, <under> the <furniture> and <under> the <furniture>, but found only
    <find>, <find> and <find>.
  <He> {turned out|emptied} the <bag>, the <bag> and the <bag> and found <find>, <find> and <find>, but no $thing.
  <He> asked <name>, <name>, <name> the <job> and {even |}<mr> <surname>, but {nobody|not one} had seen it.
  "<Pity>!" <say.past> $hero{ <adverb>|}. "{Where is|Who has taken} $hero.my $thing?" But it was not <where>, nor <where>.
seen:
  <comes> "%A <traits> $foe <walk.past> past with it," <say.past> the $pal{ <adverb>|}, "to the $place, <doing>."
  <comes> "{Have you seen|Did you see} $hero.my $thing?" <ask.past> $hero. "I saw %a <traits> $foe with it by the $place,"
    <say.past> the $pal{ <adverb>|}, "and <find>."
  <comes> <asks> "Look {by|behind} the $place," <say.past> the $pal <adverb>. "%A <traits> $foe lives there, under %a <leafy>
    <tree>, and <does>."
  There were <state> footprints {on the path|<under> the <furniture>}, <digit><last> of them, and <find>. "%A $foe!" <say.past>
    $hero <adverb>, and followed them to the $place.
caught:
  There sat %a <traits> $foe <near> the $place with <find> and the $look $thing. <claim>
  In %a <look> <bag> <he> found <find>, <find> and the $look $thing, and {behind|beside} it %a <traits> $foe in %a <garb>. <claim>
  The $foe, called <strange>, was <doing> under %a <leafy> <tree>, with <food> and the $look $thing. <claim>
claim:
  "That is $hero.my $thing!" <say.past> $hero{ <adverb>|}.
  "{Give|Hand} it back!" <say.past> $hero, as <cross> as %a <trait> <beast>.
  $Hero was not <afraid>, only <cross>. "{Give|Hand} it {over|here}!"
  "<Greet>," <say.past> $hero{ <adverb>|}, "that is {not yours|$hero.my $thing}."
excuse:
  The $foe turned <colour>. "I never had %a <look> <toy> of my own," $foe.he <say.past>{ <adverb>|}, "only <find>."
  "I only {borrowed|took|wanted} it to cheer up my <relative>," <say.past> the $foe <adverb>, "who is <trait> and <does>."
  "I was <sad>," <say.past> the $foe{ <adverb>|}, "and tired of <doing>, and it was so <look>."
  "I found it <where>," <say.past> the $foe{ <adverb>|}. "I thought it was {<name>'s|the <job>'s|some <beast>'s}!"
mercy:
  "You {could|should} have asked," <say.past> $hero <adverb>. "Come and {play with|borrow|polish} it on <weekday.pl>, and bring
    <food>." The $foe <did> and gave it back, with <find>.
  $Hero {thought|frowned} for a moment and gave the $foe <food> and %a <look> <toy> instead.
  So they made a bargain: the $thing for <find>, <find> and <food>.
  The $foe gave back the $thing, and <find> and <find> {as well|besides}, and $hero {forgave|shook hands with} $foe.him <adverb>.

// Presents for a relative, carried past an obstacle.
kinfolk*: [kin=kin_she][kinname=girl]|[kin=kin_he][kinname=boy]
errand*:
  <kinfolk>[cake=cake][gift=look_toy][place=place]<start> # <day> <sent> <journey> # <hurdle> <thanks> # <journey> <arrive> #
    <finish>
sent:
  $hero packed %a $cake, %a $gift, <food>, <food> and <find> to take to $hero.his $kin $kinname, who lived beyond the $place and
    <ails>.
  a {letter|note} on <colour> paper came from $hero.his $kin $kinname behind the $place, who <ails>. <He> took %a $cake, %a $gift,
    <find> and <food> and <walk.past> off <adverb>.
  <name> the <job> said that $hero.his $kin $kinname, beyond the $place, <ails>. So $hero packed %a $cake, %a $gift, <food>,
    <find> and <find>.
ails: had %a <trait> cold|had {hurt|broken|twisted} %a {foot|arm|ankle|wrist} <doing>|would be <digit><last> that <weekday>
  had not {smiled|laughed|slept} since <month>|was tired of <spread>|was as <sad> as %a <item>|had lost <find>
  lived on <spread> and <drink>|had nobody but %a <trait> <beast>
arrive:
  It was <digit>:<five><last> on %a <weather> <weekday> when $hero reached the $place. $Hero.His $kin was <doing>. "%A $gift and
    %a $cake!" $kin.he <say.past>{ <adverb>|}, and gave $hero.him <food> and <find>.
  "Who is there?" <say.past> $hero.his $kin{ <adverb>|}. "Only $hero.me and <food>," <say.past> $hero, and put down the $cake, the
    $gift and <find>. $Kin.He was so <glad> that $kin.he <did> and <did>.
  At the $place $hero.his $kin was waiting in %a <garb>. The $cake was <look> by now, but $kin.he ate it <adverb>, and the $gift
    went <under> the <furniture>, beside <find> and <find>.

// Three materials from three owners, who all come to see what was made of them.
making*:
  [work=work][aa=stuff][bb=stuff][cc=stuff][ann=who][bob=who][cat=who]<start> # <plan> # <ask_a> <ask_b> <journey> <ask_c> #
    <build> # <show> <ending>
work: kite|raft|lantern|cart|scarecrow|birdhouse|drum|sledge|swing|tent|puppet stage|flying machine|weathercock|bookshelf
  rocking horse|signpost|rowing boat|clock|tree house|doll's house|windmill|merry-go-round|bridge|hammock|balloon|ladder
  rabbit hutch|bench|letter box|telescope|robot|submarine
stuff: string|cloth|paint|glue|wire|wool|leather|canvas|rope|oil|chalk|varnish|sailcloth|straw|felt|cork|ribbon|wax|oak|copper
  velvet|thread|bark|clay|tar|lace|tin|bamboo|sand|silk|steel|plaster|soap
plan:
  <day> $hero decided to {make|build} %a $work for <being> and <being>. "$Hero.I need $aa, $bb and $cc," $hero.he <say.past>{
    <adverb>|}, "and <find>."
  {There was to be|<name> was planning} a {fair|party|feast} in <town> on <weekday>, and $hero meant to bring %a <look> $work.
    <He> had <find>, <find>, <find> and <find>, but no $aa, no $bb and no $cc.
  "{I know|Listen}," <say.past> $hero one <weather> <daypart>, "$hero.I will {make|build} %a $work, as <look> as %a <toy>!" All
    that was {missing|wanting} was $aa, $bb, $cc, <find> and <find>.
ask_a:
  %A <traits> $ann <where> had $aa, and gave $hero some for <food> and <find>.
  First <he> <walk.past> to the <spot> <place>, where %a <traits> $ann was <doing>. "Take the $aa, and <find>," <say.past> the
    $ann{ <adverb>|}.
  The $ann, who was <doing>, had $aa <under> the <furniture>, with <find> and <find>. "It is yours," $ann.he <say.past>{
    <adverb>|}.
ask_b:
  %A <traits> $bob {at|by} the <spot> <place> had $bb, but wanted <food> for it. <swap>
  The $bob was more <trait>. "$Bb?" $bob.he <say.past>{ <adverb>|}. "First {find|fetch} {me |}<find> and <find>!" <swap>
  {Next|Then} <he> asked the $bob, in %a <garb>, for $bb. <swap>
swap:
  $Hero gave $bob.him <find>, and they were both <glad>.
  $Hero {swept|painted|tidied} the <spot> <place> for $bob.him, <doing>, and was given it all.
  It took <digit><last> days and <food>, but {in the end|at last} the $bob {agreed|gave in} <adverb>.
ask_c:
  But there was no $cc, not <where>, not even <where>. Then %a <traits> $cat <walk.past> {up|by} with %a <look> <bag> full of it,
    <doing>.
  At last <he> came to %a <traits> $cat <near> the <spot> <place>. "$Cc costs <digit><last> <fruit.pl>," <say.past> the $cat{
    <adverb>|}, "but for %a <trait> $kind it is {free|one <taste> <fruit>}."
  The $cat had {sold|lent|given} the last of the $cc to <being>, but <walk.past> off <adverb> and brought it back in %a <looks>
    <bag>.
build:
  $Hero worked {until <weekday>|for <digit><last> hours}, with %a <look> <tool>, %a <look> <tool> and %a <look> <tool>, and
    stopped only for <food>.
  <He> {tied|stuck|nailed} the $aa to the $bb, and the $bb to the $cc, and hung <find>, <find> and <find> on top.
  The first $work looked like %a <trait> <beast>, the second like %a <item>, but the third was <look>, <look> and <look>.
show:
  On <weekday> the $ann, the $bob and the $cat came. "What %a <look> $work!" <say.past> the $ann <adverb>. The $bob <did>, and the
    $cat brought <food>, <food> and <find>.
  <name>, <name> and <name> came to see the $work. "It is <look>," <say.past> the $bob <adverb>. "And <look>," <say.past> the
    $ann. "And partly $cc," <say.past> the $cat <adverb>.
  The $work was the most <trait> thing in <town>. $Hero let the $ann try it, then the $bob, then the $cat, then <name>, <name> and
    <sight>.

// Two friends, one thing, and a third who shows them better.
quarrel*:
  [friend=friend][look=state][thing=toy]<single> <mate> # <day> <both> # <row> <row> # <parted> <hurdle> # <share> <ending>
mate:
  $Hero.His best friend was $friend, who was <trait> and {loved|taught $hero.him} <doing>.
  {Next door|Across the <path>} lived $friend, %a <trait> child who <did> on <weekday.pl>.
  $Hero and $friend did everything together: they <did>, <did> and {even |}<did>.
both:
  $hero and $friend found %a $look $thing <where>, between <find> and <find>.
  <being> gave $hero and $friend %a $look $thing for <doing>.
  $hero and $friend saw %a $look $thing <where>, both at once, beside <sight>.
row:
  "{It is|The $thing is} mine!" <say.past> $hero{ <adverb>|}. "You have <find>, and <find>!"
  "You have <find> already," <say.past> $friend{ <adverb>|}, "and you broke my <look> <toy>."
  "You are as <trait> as %a <trait> <beast>!" <say.past> $friend <adverb>. "And you are as <trait> as %a <item>!" <say.past>
    $hero.
  They pulled <adverb>, and <count> <bird.pl> and <being>, who had been <doing>, fled.
  "I need it for my <trait> <relative>," <say.past> {$hero|$friend}{ <adverb>|}, "who has only <find>."
parted:
  So $friend <walk.past> off with the $thing, <cross>, and $hero <walk.past> past the <spot> <place>, <sad>, <doing>.
  So the $thing was left <where>, and both <walk.past> off, $hero as <cross> as %a <trait> <beast> and $friend <sad>.
  Neither {spoke|said a word} until <weekday>. $Hero ate <food> and <food>, but {without|with no} $friend it tasted of <objects>.
    So <he> set out for the <spot> <place>.
share:
  And {there|behind the <place>} stood $friend with <find>. "{I am sorry|Forgive me}," <say.past> {$friend|$hero} <adverb>. "Let
    us share the $thing: you on <weekday.pl>, I on <weekday.pl>."
  $Hero found $friend <where>, <doing>. "I was too <trait>," <say.past> {$hero|$friend} <adverb>. So they shared <food> and hung
    the $look $thing <under> the <furniture>.
  When $hero told $friend of the $pal, they both <did>, and the $look $thing went to the $pal, who had only <find> and <find>.

// A boastful rival, and a stop on the way that costs the race or wins it.
contest*:
  [foe=rival][sport=sport][look=state][thing=toy]<single> # <notice> <boast> <train> # <race_day> <stop> # <result> <ending>
sport: kite race|pie contest|sack race|singing contest|snail race|raft race|pumpkin show|three-legged race|spelling bee
  egg-and-spoon race|sheepdog trial|pancake race|swimming race|whistling contest|sandcastle contest|hat parade|ploughing match
  wheelbarrow race|riddle contest|flower show|cheese roll|cart race|tree climb
rival: hyena/m|turkey/m|peacock/m|cockerel/m|vulture/f|mink/f|llama/f|poodle/m|racehorse/m|stag/m|cheetah/f|falcon/m|tomcat/m
  gander/m|coyote/m|cobra/f|baboon/m
notice:
  <day> <name> the <job> {nailed|stuck} %a <colour> notice to the <shop>: "Great $sport {on <weekday>|in <town>}! First prize: %a
    $look $thing. Second: <find>. Third: <find>."
  Every <month> there was a {great|grand|famous} $sport {by|at} the <spot> <place>, and this time the prizes were <food>, <find>
    and %a $look $thing.
boast:
  "Nobody can beat me," <say.past> %a <traits> $foe <adverb>, <doing> in %a <garb>. "$Hero is too <trait>, and <name> is too
    <trait>."
  The $foe, called <strange>, who had won it <digit><last> times, laughed <adverb> at $hero. "%A $kind as <look> as %a <object>?
    Never!"
train:
  <He> trained every <daypart> {by|behind} the <spot> <place>, living on <food> and <food>, and <adverb> <did>.
  $Hero.His <relative>, %a <trait> <job>, taught $hero.him to <todo>, to <todo> and to breathe <adverb>.
  For <digit><last> days <he> tried it with %a <look> <tool>, %a <look> <tool> and <digit><last> spoons of <spread>.
race_day:
  On the day <sky>. <Being>, <name> and <sight> came to watch. The <job> blew %a <looks> {horn|whistle}, and {off they went|it
    began}.
  Half of <town> was there: <name>, <name>, <name>, <sight> and <sight>. "Ready? Go!" <say.past> <mr> <surname> <adverb>.
stop:
  $Hero was ahead of <name>, <name> and <name> when <he> saw [pal=who]%a <traits> $pal {in the ditch|under %a <leafy> <tree>|with
    a twisted ankle|in tears}. <He> stopped and gave $pal.him <food>, <find> and %a <look> <tool>.
  {Half-way|Near the end}, by the <spot> <place>, the $foe fell into {the mud|the <flower.pl>|%a <look> <bag>}. <name>, <name> and
    <name> <walk.past> past, but $hero and [pal=who]%a <traits> $pal pulled $foe.him out <adverb> with %a <look> <tool>.
result:
  So $hero came in after <name>, <name>, <name> and <name>. But the $pal was a friend of <name>, the judge, and handed $hero the
    $look $thing <adverb>, with <food>.
  The $foe won by <digit><last> steps. But {that evening|at supper} $foe.he brought $hero the $thing and <food>. "I was <trait>,"
    $foe.he <say.past> <adverb>, "and you were <trait>."
  And still $hero won, by <digit><last> inches! The $pal <did>, the $foe bowed <adverb>, and <name>, <name> and <name> threw
    <items>.

// A lost young animal, fed, named, and brought back to its mother.
stray*: [baby=baby][pet=name]<start> # <day> <found> <care> # <named> <care> # <hunt> <hurdle> # <mother> # <later>
baby: duckling/f|fawn/f|bear cub/m|gosling/m|piglet/m|foal/f|owlet/m|fox cub/m|seal pup/f|calf/f|wolf cub/m|cygnet/f|chick/f
  kid goat/m|baby elephant/m|bat/m|fledgling/f|baby hedgehog/m|baby dragon/m|baby badger/f|baby camel/f|lion cub/m|baby unicorn/f
found:
  $hero followed %a <trait> noise and found %a <traits> $baby <where>, {wet and cold|all alone|shivering} beside <find>.
  %a <traits> $baby <walk.past> up to $hero from the <spot> <place>, <sad>, with <find> round $baby.his neck.
  $hero found %a <size> <colour> $baby <under> the <furniture>, fast asleep on <find> and <find>.
care:
  <He> dried $baby.him with %a <garb> and fed $baby.him <food>, <food> and <food>.
  The $baby would not touch <food> or <food>, only <food>.
  <He> made $baby.him a bed of <items> in %a <look> <bag> <under> the <furniture>.
  At night the $baby cried, and <he> {sang|whispered} to $baby.him {about|of} <sight> and <sight>.
  The $baby chewed %a <look> <toy>, <count> <fruit.pl> and the <job>'s <fit> <wear>, but nobody was <cross> for long.
named:
  "$Hero.I will call you $pet," <say.past> $hero{ <adverb>|}, "for you are as <look> as %a <object>, and as <trait> as <name>."
  By <weekday> the $baby answered to $pet, could <todo> and was fond of <doing>.
hunt:
  But $pet {missed|wanted} $baby.his mother, and grew <sad>. "She must be beyond the <spot> <place>," <say.past> <name> the <job>
    <adverb>, so they packed <find> and <walk.past> off.
  "%A $baby needs $baby.his mother," <say.past> $hero.his <kin>{ <adverb>|}. So $hero packed <food>, <food> and <find>, took $pet
    and set out for <town>.
mother:
  Beyond the <spot> <place>, {by|under} %a <leafy> <tree>, stood $pet's mother, <trait> and <sad>. $Pet <walk.past> to her <like>,
    and $hero was <glad> and <sad> at once.
  There was %a <trait> {cry|call|whistle} from the <flower.pl>: $pet's mother! She {licked|sniffed|hugged} $pet <adverb> and gave
    $hero <find>, <find> and <food>.
later:
  Every <month>, when <sky>, $pet came back with <find> and <food>.
  Next <month> there was a {knock|scratch} at the door: $pet, grown as <size> as %a <beast>, with <name>, <name>, <name> and
    <food>.
  It was too quiet without $pet. Then <find>, <find> and <find> lay on the doorstep one <daypart>, and $hero knew who had
    {left|brought} them.

// This for that for the other thing: the chain is unwound from its far end.
trade*:
  [look=state][thing=toy][ann=who][bob=who][cat=who][first=look_tool][second=look_wear][third=cake]<start> # <window> # <bob_has>
    # <cat_has> # <hurdle> # <back> # <finish>
window:
  %A <traits> $ann, who lived <home>, had %a $look $thing, and $hero wanted it more than <find>, <find> or <find>. "You may have
    it for %a $first," <say.past> the $ann{ <adverb>|}.
  <day> $hero saw %a $look $thing in the window of the <shop>, between <find> and <find>. "It costs %a $first," <say.past> the
    $ann <adverb>, <doing>.
bob_has:
  {The only|There was just one} $first {was|to be had, and it was} the $bob's. "Well," <say.past> the $bob <adverb>, "bring me %a
    $second, for I am tired of <doing> in %a <garb>."
  <He> <walk.past> to %a <traits> $bob <near> the <spot> <place>, who owned %a $first and <find>. "It is yours," <say.past> the
    $bob <adverb>, "for %a $second."
  <He> asked <name>, <name> and <being> for %a $first, and {last|then} the $bob, who was <doing>. But the $bob would only
    {sell|swap} it for %a $second.
cat_has:
  {Now|And} %a $second hung <where>, with <find>, and the owner was %a <traits> $cat. "Gladly," $cat.he <say.past> <adverb>, "but
    first bring me %a $third."
  %A <traits> $cat {by|at} the <spot> <place> had %a $second. "I would give it for %a $third," $cat.he <say.past> <adverb>. "I
    have had nothing but <food> and <food> since <weekday>."
  "Here is %a $second," <say.past> %a <traits> $cat from under %a <leafy> <tree>, <doing>. "All I want is %a $third." So $hero set
    out for <town> to find one.
back:
  So $hero gave the $third to the $cat, the $second to the $bob and the $first to the $ann, and got the $look $thing, <food>,
    <food>, <find> and <find>.
  The $cat ate the $third <adverb>, the $bob <did> in the $second, the $ann <did> with the $first, and $hero <walk.past> home with
    the $look $thing.

// A wish that comes true too well, and a spell worth remembering.
wish*:
  [look=state][thing=toy][snack=fruit][spell=spell]<start> # <day> <magic> <speaks> # <wished> <too_many> <too_many> # <pause>
    <comes> <undo> # <finish>
spell*: <Sound><sound> <sound><sound>|<Sound><sound><sound>|<Sound><sound> <sound><sound> <sound><sound>
magic:
  $hero {dug up|found} %a $look $thing <where>, and when <he> {rubbed|shook|polished} it, it glowed <colour>, smelled of <spread>
    and sang "<song>".
  <being> gave $hero %a $look $thing for <food> and <find>, and said <adverb> that it was magic.
  $hero bought %a $look $thing for <digit><last> pennies at the <shop>, between <find> and <find>.
speaks:
  On it was written in <look> letters: "Say $spell and wish." <He> tried it <adverb>. "$Spell!"
  "One wish," <say.past> the $thing <adverb>, "nothing too <look>, and then you say $spell. Last time it was <find>."
wished:
  "$Hero.I want $snack.pl," <say.past> $hero <adverb>, for <he> had eaten only <food>. "As many as there are <objects> in <town>!"
  $Hero thought of %a <look> <toy>, of <find> and of <doing>. "$Snack.pl!" <he> <say.past> <adverb>.
too_many:
  There were $snack.pl <under> the <furniture>, $snack.pl <under> the <furniture> and {even |}$snack.pl in the <look> <bag>.
  $Snack.pl rolled out of the <furniture> and {chased|hit|buried} %a <trait> <beast>, %a <trait> <job> and <name>.
  <name> slipped on one, <name> trod on <digit><last>, and <mr> <surname> sold <digit><last><last> at the <shop>.
  For {breakfast|lunch|supper} there were $snack.pl with <spread>, $snack.pl with <spread> and, for the <beast.pl>, $snack.pl in
    <drink>.
  By <weekday> the <shop> was full, and the $snack.pl stood as high as the <spot> <place>.
undo:
  "Say $spell backwards," <say.past> the $pal <adverb>, "while <doing>." Every $snack was gone, and so was %a <item>.
  The $pal sniffed at the $thing. "Put it back <where>, under <find>," $pal.he <say.past> <adverb>, "and never say $spell while
    <doing>." So <he> did, and the $snack.pl vanished.
  "That is easy," <say.past> the $pal <adverb>. "Ask your friends." So came <name>, <name>, <sight> and <sight>, and they ate for
    <digit><last> days, and the $thing was given to the $pal.

// A promise for Sunday, and a week in its way.
week*:
  [friend=friend][work=work]<start> # <promise> # On Monday <deed> On Tuesday <deed> On Wednesday <deed> # On Thursday <deed> On
    Friday <deed> On Saturday <deed> # <sunday>
promise:
  One <weather> week in <month> $hero promised $friend %a $work by Sunday, %a <look> one, with <find> and <find> on top.
  $Hero.His friend $friend, who was <trait>, <trait> and <digit><last> days older, {wanted|wished for} %a $work. "$Hero.I will
    make it by Sunday," <say.past> $hero <adverb>.
  "$Hero.I have a whole week for the $work," <say.past> $hero to $friend <adverb>. "What could go wrong, but <beast.pl>, <spread>
    and <name>?"
deed:
  <he> {bought|borrowed|begged} <find>, <find> and <find>, but then <he> <did>.
  <being> came with <find> and <food>, and they <did> until {dark|<digit>:<five><last>}.
  <he> found <find> <where>, and <find>, and {sold|gave} them to <being>.
  it was <weather>, so <he> {stayed in bed|sat <under> the <furniture>} with <food>, <food> and <food>.
  <name>, <name> and <name> <did> <where>, and <he> {helped|watched|had to count}.
  <he> <walk.past> to <town>, <doing>, and <walk.past> home <adverb> with <find>.
  <he> lost <find>, looked <under> the <furniture>, and found <find> and <find>.
  <count> <trait> <beast.pl> sang "<song>" {in|near|behind} the <place>, and <being> <did>.
  %a <trait> <job> fell into the <spot> <place> with <find>, and <he> {fished|pulled} out <find> and <find>.
  <he> wrote to <name> in <town> about <items>, and <name> wrote back about <doing>.
  {there was a fair|there was a sale|they danced} in <town>, with <sight>, <sight> and <food>.
sunday:
  And on Sunday? There was still no $work, only <find>, <find> and <food>. But $friend <did> for joy. "It is better than %a
    $work," $friend.he <say.past> <adverb>. "It is <look>, and it is ours."
  On Sunday $hero built the $work before breakfast, out of <find>, <find> and <find>. It was <look>, <look> and <size>, and
    $friend, <glad>, called it <strange>.
  On Sunday $friend came, in %a <garb>. "{Where is|And} my $work?" So $hero told of the week, from <being> to <find>, and $friend
    laughed so <adverb> that the $work was forgotten until <weekday>.

// Among the exhibits is something that somebody lost.
museum*: [look=state][thing=toy][pal=who]<single> # <day> <opens> # <exhibits> <visitors> # <knows> # <reward> <ending>
opens:
  $hero opened a museum in %a <looks> <dwelling> <near> the <spot> <place>. {A ticket|To look} cost <count> <fruit.pl>, or <find>.
  $hero cleared the <furniture>, the <furniture> and <name>'s <furniture>, painted them <colour>, and called it the <town_a>
    Museum.
  $hero had so many things, from <find> to <find>, that <name> the <job> <say.past> <adverb>, "It is a museum!" And so it was.
exhibits:
  Number <digit><last> was %a <item>, number <digit><last> was %a $look $thing found <where>, and number <digit><last> was <find>,
    once the pride of <being>.
  On the {first|upper} shelf stood <find>, <find> and <find>; on the next, <find> and %a $look $thing; {underneath|at the bottom},
    <food> and <find>.
  There was %a <item> that had been to <town>, %a <item> that sang "<song>", and %a $look $thing about which <he> knew nothing,
    between <find> and <find>.
visitors:
  <Name>, <name>, <name> and <sight> came on the first <daypart>, and <name> sat on <find>.
  "How <look>!" <say.past> <name> <adverb>. "How <look>!" <say.past> <being>, <doing>.
  <Being> looked for <digit><last> minutes at <find> and <say.past>, "I have two of those at home, and %a <item>."
knows:
  Then %a <traits> $pal <walk.past> in, saw the $look $thing and turned <colour>. "My $thing!" $pal.he <say.past> <adverb>. "I
    lost it <where>, <digit><last> years ago, <doing>."
  Last came %a <traits> $pal in %a <garb>, and stopped before the $look $thing, <sad>. "My <relative> made it <thing_word>,"
    $pal.he <say.past> <adverb>, "out of <find>, on %a <weather> <weekday>."
thing_word*: by hand|in <town>|for love|one <month>
reward:
  "Then it is yours," <say.past> $hero <adverb>, and wrapped the $thing in %a <garb>. And the $pal came back on <weekday> with
    <find>, <find> and <find> for the empty place.
  $Hero looked at the $thing, and at the $pal, and took it off the shelf. "Take <food> too," <he> <say.past> <adverb>. The $pal
    <did>, and in place of the $thing <he> put a card: "Gone home with %a $pal."
  So the $thing went home with the $pal, and $hero got <food>, <food> and {a share of|half} %a <look> <dwelling> in <town>.

// A birthday, and nothing in the shops.
present*:
  [friend=friend][look=state][thing=toy]<single> # <birthday> # <shopping> <shopping> <shopping> # {<hurdle> # |}<unwrap> <feast>
    <ending>
birthday:
  <day> $hero remembered that $friend would be {seven|eight|nine|six|ten|eleven} {tomorrow|on <weekday>}. $Friend was <trait>,
    liked <doing> and <doing>, and already had <find> and <find>.
  $Friend had asked for nothing but <find> for $friend.his birthday, which was like asking for <find>. So <day> $hero, {with
    <digit><last> pennies|with an empty <bag>}, <walk.past> to <town>.
shopping:
  The <shop> had only <items>, <items> and, for those who liked <doing>, <find>.
  <Name> the <job> {offered|showed} $hero.him <find> for <digit><last> pennies and <find> for less, but they were too <look>.
  "$Friend has <find> already," <say.past> <name> <adverb>, "and gave <find> away. {Try|Why not} <food>?"
  {At|By} the <spot> <place> <being> sold <items>, but none of them was <look> enough.
  In the window of the <shop> <he> saw <find>, price <digit><last><last> pennies, and <find>, price <digit><last>, and sighed
    <adverb>.
  <He> thought of <food>, then of <food>, and ate both on the way to the <spot> <place>, <doing>.
unwrap:
  {So|In the end} $hero made %a $look $thing out of <find>, <find> and <find>. "It is the best of all," <say.past> $friend
    <adverb>, "better than <find>."
  <Where>, quite by chance, <he> found %a $look $thing. $Friend <did> with it till supper, and slept with the $thing
    {under|beside} the pillow.
  {So|In the end} <he> gave $friend $hero.his own $look $thing, which $friend had always wanted. And $friend, <glad>, gave $hero
    <find>, which $hero had always wanted{ too|}.

// A letter, a request, an answer.
letters*:
  {[kin=kin_she][friend=girl]|[kin=kin_he][friend=boy]}[thing=toy][look=state][town=town]<single> # <post> "Dear $hero," it said.
    "<news> <news> <need> Your <trait> $kin, $friend." # <sends> # "Dear $friend," wrote $hero. "<news> <news> I hope that the
    $thing is <look> enough. Your <trait> $hero." # <answer> {<feast> |}<ending>
post:
  <Day> %a <trait> <job> brought a letter on <colour> paper from $town.
  <Day> <he> found a letter from $town <under> the <furniture>, between <find> and <find>.
  <Day> %a <trait> <bird> dropped a letter from $town into <food>.
news:
  It has been <weather> here since <month>, and <being> has taken up <doing>.
  I am well, but <trait>, and tired of <food>, <food> and <doing>.
  <Name>, <name> and %a <trait> <beast> called <name> send you <find>.
  On <weekday> <name> fell off %a <item>, and now <being> must <todo>.
  We have <digit><last> <trait> <beast.pl> in the <furniture>, and nobody can sleep for their '<song>'.
  My neighbour <girl> <does>, her <kin_she> <does>, and the <job> <does> <where>.
  Somebody has put <find> and <find> <where>, and nobody will say why.
  My <fit> <wear> is <colour> now, thanks to <spread>, and my <fit> <wear> fits <name>.
need:
  What I need is %a $look $thing, for {without one|unless I get it} I cannot <todo>.
  Please send %a $look $thing, and quickly, for <being> sat on mine while <doing>.
  Have you %a $look $thing to spare? I would give <find> and <find> for it.
sends:
  $Hero had no $thing, so <he> <walk.past> to the <spot> <place>, where <being> sold $hero.him one for <food> and <find>.
    <journey>
  The $thing was <under> the <furniture>, under <find>, <find> and <find>. <He> polished it <adverb> and gave it to <being> to
    take to $town.
  "%A $look $thing!" <say.past> $hero <adverb>. "Who has %a $look $thing?" <Name> had <find>, <name> had <find>, and <name> the
    <job>, <doing>, had the $thing.
answer:
  And $friend wrote back from $town <digit><last> days later, with <food>: "It is <look>, and I <todo> with it every <daypart>."
  No answer came. But one <weather> <weekday> there stood $friend, all the way from $town, with the $thing, <find> and <food>.
)";

// -------------------------------------------------------------------------------------------------------------------------------
// The compiled grammar: a rule is a list of choices, a choice a list of steps.

// What a mention of a remembered thing can ask for, after the word forms: pronouns and their kin, one column a gender or number.
enum { HE = WORD_FORMS, HIM, HIS, HIMSELF, WAS, I, ME, MY, FORMS };

const char* const form_names[FORMS] = {"", "pl", "es", "past", "ing", "he", "him", "his", "himself", "was", "I", "me", "my"};
const char* const pronouns[FORMS - HE][4] = {           // m, f, n (things), p (plural)
    {"he", "she", "it", "they"}, {"him", "her", "it", "them"}, {"his", "her", "its", "their"},
    {"himself", "herself", "itself", "themselves"}, {"was", "was", "was", "were"}, {"I", "I", "I", "we"},
    {"me", "me", "me", "us"}, {"my", "my", "my", "our"}};

struct Step {
    enum Kind : uint8_t { TEXT, ARTICLE, PARAGRAPH, DRAW, MENTION, BIND } kind = TEXT;
    bool capital = false;               // <Rule>, $Name, %A: an upper-case letter begins what comes out
    uint8_t form = PLAIN;
    int rule = -1, name = -1;           // DRAW, BIND: which rule; MENTION, BIND: which name
    string text;                        // TEXT
};

struct Choice {
    std::vector<Step> steps;
    uint32_t times = 1, weight = 0;
    double weight_bits = 0;             // log2(weight)
    uint32_t used = 0;                  // drawn in this period of its rule (see draw)
    char gender = 'n';                  // word/m word/f word/p
    string form[WORD_FORMS];            // if the choice is a plain word
};

struct Rule {
    string name;
    bool repeats = false;               // may draw a choice twice in a story
    bool words = true;                  // every choice is a plain word
    char gender = 'n';                  // of its words, unless they say otherwise
    std::vector<Choice> choices;
    std::vector<uint32_t> cumulative;   // weights up to and including each choice
    uint32_t total = 0;
    uint32_t story = 0, period = 0;     // the story this rule was last drawn in; periods end when half of the choices are used
    uint32_t used_weight = 0, used_count = 0;
};

struct Grammar {
    std::vector<Rule> rules;
    std::map<string, int> rule_index, name_index;
    std::map<int, string> inflected;    // rules drawn in a form other than plain, and where: they must be lists of words

    int rule(const string& name) {
        auto [at, fresh] = rule_index.try_emplace(name, (int)rules.size());
        if (fresh) rules.emplace_back().name = name;
        return at->second;
    }
    int name(const string& n) { return name_index.try_emplace(n, (int)name_index.size()).first->second; }
};

[[noreturn]] void bad_grammar(const string& what, const string& near) { fail("grammar: " + what + " near '" + near + "'"); }

void add_choice(Grammar& g, int rule, const string& source, const string& where);

// Splits at the bars that are not inside braces; reading an alternative may come back here for the braces inside it.
void add_choices(Grammar& g, int rule, const string& text) {
    size_t start = 0, depth = 0;
    for (size_t i = 0; i <= text.size(); i++) {
        if (i < text.size() && text[i] == '{') depth++;
        if (i < text.size() && text[i] == '}') depth--;
        if (i < text.size() && (text[i] != '|' || depth)) continue;
        add_choice(g, rule, text.substr(start, i - start), text);
        start = i + 1;
    }
}

// Reads one alternative into steps. The language is described above the grammar's text. A malformed grammar is our mistake, not the
// user's, but it must not go unseen: whatever cannot be read is an error.
void add_choice(Grammar& g, int rule, const string& source, const string& where) {
    Choice c;
    string text = source, literal;
    if (text.size() > 1 && text[1] == '*' && isdigit((unsigned char)text[0])) {
        c.times = (uint32_t)(text[0] - '0');
        text = text.substr(text.find_first_not_of(' ', 2));
    }
    auto step = [](Step::Kind kind) { Step s; s.kind = kind; return s; };
    auto flush = [&] {
        if (!literal.empty()) { c.steps.push_back(step(Step::TEXT)); c.steps.back().text = literal; }
        literal.clear();
    };
    // "name" or "name.form", a capital first letter meaning that the output has one
    auto reference = [&](Step& s, const string& r, bool is_rule) {
        size_t dot = r.find('.');
        string n = r.substr(0, dot), f = dot == string::npos ? "" : r.substr(dot + 1);
        if (f.size() > 1 && f[0] >= 'A' && f[0] <= 'Z') { s.capital = true; f[0] |= 0x20; }
        if (n[0] >= 'A' && n[0] <= 'Z') { s.capital = true; n[0] |= 0x20; }
        int form = 0;
        while (form < FORMS && f != form_names[form]) form++;
        if (form == FORMS || (is_rule && form >= WORD_FORMS)) bad_grammar("no form '" + r + "'", where);
        s.form = (uint8_t)form;
        if (is_rule) s.rule = g.rule(n); else s.name = g.name(n);
        if (is_rule && form) g.inflected[s.rule] = where;
    };
    for (size_t i = 0; i < text.size();) {
        char ch = text[i];
        if (ch == '<' || ch == '[') {
            size_t end = text.find(ch == '<' ? '>' : ']', i);
            if (end == string::npos) bad_grammar("no end of <> or []", where);
            string inside = text.substr(i + 1, end - i - 1);
            flush();
            Step s = step(ch == '<' ? Step::DRAW : Step::BIND);
            if (ch == '[') {
                size_t eq = inside.find('=');
                if (eq == string::npos) bad_grammar("no = in []", where);
                s.name = g.name(inside.substr(0, eq));
                s.rule = g.rule(inside.substr(eq + 1));
            } else reference(s, inside, true);
            c.steps.push_back(s);
            i = end + 1;
        } else if (ch == '{') {
            size_t end = i, depth = 0;
            do { depth += text[end] == '{'; depth -= text[end] == '}'; end++; } while (depth && end < text.size());
            if (depth) bad_grammar("no end of {}", where);
            flush();
            Step s = step(Step::DRAW);                  // braces are a rule without a name, which may repeat itself
            s.rule = g.rule("{" + std::to_string(g.rules.size()) + "}");
            g.rules[s.rule].repeats = true;
            add_choices(g, s.rule, text.substr(i + 1, end - i - 2));
            c.steps.push_back(s);
            i = end;
        } else if (ch == '$') {
            size_t end = i + 1;
            while (end < text.size() && isalpha((unsigned char)text[end])) end++;
            if (end + 1 < text.size() && text[end] == '.' && isalpha((unsigned char)text[end + 1])) {   // not a full stop
                end++;
                while (end < text.size() && isalpha((unsigned char)text[end])) end++;
            }
            flush();
            Step s = step(Step::MENTION);
            reference(s, text.substr(i + 1, end - i - 1), false);
            c.steps.push_back(s);
            i = end;
        } else if (ch == '%') {
            flush();
            Step s = step(Step::ARTICLE);
            s.capital = text[i + 1] == 'A';
            c.steps.push_back(s);
            i += 3;                                     // the space behind %a goes with it
        } else if (ch == '#') {
            while (!literal.empty() && literal.back() == ' ') literal.pop_back();
            flush();
            c.steps.push_back(step(Step::PARAGRAPH));
            for (i++; i < text.size() && text[i] == ' ';) i++;
        } else literal += ch, i++;
    }
    bool word = c.steps.empty() && !literal.empty();    // nothing but letters: inflect it here, once for all stories
    if (word) {
        c.gender = g.rules[rule].gender;
        size_t slash = literal.size() - 2;
        if (literal.size() > 2 && literal[slash] == '/') { c.gender = literal.back(); literal.resize(slash); }
        for (int f = 0; f < WORD_FORMS; f++) c.form[f] = inflect(literal, (Form)f);
    }
    flush();
    Rule& r = g.rules[rule];
    r.words = r.words && word;
    r.choices.push_back(std::move(c));
}

// Zipf-Mandelbrot: of n alternatives, that of rank r = 0, 1, ... weighs 1 / (r + 4 + n/4), in integers. The words of a real text
// fall off like this; the offset, larger for longer lists, keeps the first words from drowning the others.
void weigh(Rule& r) {
    for (size_t rank = 0; rank < r.choices.size(); rank++) {
        Choice& c = r.choices[rank];
        c.weight = c.times * (uint32_t)((1u << 24) / (16 * rank + 64 + 4 * r.choices.size()));
        c.weight_bits = std::log2((double)c.weight);
        r.cumulative.push_back(r.total += c.weight);
    }
}

Grammar compile(const char* text) {
    std::vector<string> lines;                          // without comments, continuations joined to what they continue
    for (const char* at = text; *at;) {
        const char* end = strchr(at, '\n');
        string s(at, end);
        at = end + 1;
        if (begins_with(s, "    ")) lines.back() += s.substr(3);
        else if (!s.empty() && !begins_with(s, "//")) lines.push_back(s);
    }
    Grammar g;
    int rule = -1;
    for (string s : lines) {
        if (s[0] != ' ') {
            size_t colon = s.find(':');
            string head = s.substr(0, colon);
            char gender = head[colon - 2] == '/' ? head[colon - 1] : 'n';
            if (gender != 'n') head.resize(colon - 2);
            bool repeats = head.back() == '*';
            if (repeats) head.pop_back();
            rule = g.rule(head);
            g.rules[rule].repeats = repeats;
            g.rules[rule].gender = gender;
            s = s.substr(colon + 1);
        }
        size_t first = s.find_first_not_of(' ');
        if (first != string::npos) add_choices(g, rule, s.substr(first));
    }
    for (Rule& r : g.rules) {
        if (r.choices.empty()) fail("grammar: rule '" + r.name + "' has no alternatives");
        weigh(r);
        std::map<string, int> seen;                     // a word twice in a list would be two derivations of one text
        for (const Choice& c : r.choices)
            if (r.words && seen[c.form[PLAIN]]++) fail("grammar: '" + c.form[PLAIN] + "' twice in " + r.name);
    }
    for (auto& [r, where] : g.inflected)
        if (!g.rules[r].words) bad_grammar("an inflected rule '" + g.rules[r].name + "' that is not a list of words", where);
    return g;
}

// -------------------------------------------------------------------------------------------------------------------------------
// The writer: walks the steps, remembers what was named, keeps count of the bits.

struct Remembered {                     // what [name=rule] bound
    string text;
    const Choice* word = nullptr;       // for its other forms; none if a phrase
    char gender = 'n';
};

struct Writer {
    Grammar& g;
    Random random;
    string out;
    double bits = 0;
    uint32_t story = 0;
    std::vector<Remembered> names;
    bool article = false, capital = false;              // owed to the next text that comes
    char last_gender = 'n';             // of the last word drawn: a phrase has that of its last word ("old tin whistle", "a fox")

    Writer(Grammar& grammar, uint64_t seed) : g(grammar), random{seed}, names(grammar.name_index.size()) {}

    // Everything printed comes through here. Articles and capitals wait for the first text that is not empty, since only that
    // knows its first letter.
    void put(const string& s) {
        if (s.empty()) return;
        if (article) {
            out += capital ? 'A' : 'a';
            out += takes_an(s.c_str()) ? "n " : " ";
            article = capital = false;
        }
        out += s;
        if (capital) {
            char& c = out[out.size() - s.size()];
            if (c >= 'a' && c <= 'z') c = (char)(c - 32);
            capital = false;
        }
    }

    // One random choice, and its bits. A rule does not repeat a choice within a story until half of its choices have been used
    // (it would read badly, and two friends would share a name): those are drawn again, so that the others' probabilities are
    // their weights over the weight not yet used.
    const Choice& draw(int rule) {
        Rule& r = g.rules[rule];
        bool once = !r.repeats && r.choices.size() > 1;
        if (once && (r.story != story || 2 * r.used_count >= r.choices.size())) {
            r.story = story;
            r.period++;
            r.used_weight = r.used_count = 0;
        }
        for (;;) {
            uint32_t u = random.below(r.total);
            size_t lo = 0, hi = r.cumulative.size() - 1;                // the first choice whose cumulative weight is above u
            while (lo < hi) {
                size_t mid = (lo + hi) / 2;
                if (r.cumulative[mid] > u) hi = mid; else lo = mid + 1;
            }
            Choice& c = r.choices[lo];
            if (once && c.used == r.period) continue;
            if (r.choices.size() > 1) bits += std::log2((double)(r.total - r.used_weight)) - c.weight_bits;
            if (once) { c.used = r.period; r.used_weight += c.weight; r.used_count++; }
            return c;
        }
    }

    void mention(const Remembered& m, uint8_t form) {
        int column = m.gender == 'm' ? 0 : m.gender == 'f' ? 1 : m.gender == 'n' ? 2 : 3;
        if (form == PLAIN) put(m.text);
        else if (form < WORD_FORMS) put(m.word ? m.word->form[form] : m.text);
        else put(pronouns[form - HE][column]);
    }

    void expand(const Choice& c) {
        for (const Step& s : c.steps) {
            capital = capital || s.capital;
            switch (s.kind) {
                case Step::TEXT: put(s.text); break;
                case Step::ARTICLE: article = true; break;
                case Step::PARAGRAPH: out += '\n'; break;
                case Step::MENTION: mention(names[s.name], s.form); break;
                case Step::DRAW: write(s.rule, s.form); break;
                case Step::BIND: {                                      // write aside, and keep that text under its name
                    string kept = std::move(out);
                    out.clear();
                    bool owed[2] = {article, capital};
                    article = capital = false;
                    const Choice& chosen = write(s.rule, PLAIN);
                    bool word = g.rules[s.rule].words;
                    names[s.name] = {out, word ? &chosen : nullptr, word ? chosen.gender : last_gender};
                    out = std::move(kept);
                    article = owed[0], capital = owed[1];
                }
            }
        }
    }

    // Draws from a rule and prints what came: a word in the form asked for, or the steps of a phrase.
    const Choice& write(int rule, uint8_t form) {
        const Choice& c = draw(rule);
        if (g.rules[rule].words) {
            put(c.form[form]);
            last_gender = c.gender;
        } else expand(c);
        return c;
    }
};

int main(int argc, char** argv) {
    const char* usage = "usage: stories [--mb N] [--seed S] OUT.txt";
    double megabytes = 16;
    uint64_t seed = 1;
    string path;
    for (int i = 1; i < argc; i++) {
        string a = argv[i];
        bool mb = a == "--mb";
        if (mb || a == "--seed") {
            if (++i == argc) fail(a + " needs a value; " + usage);
            char* end = nullptr;
            if (mb) megabytes = strtod(argv[i], &end); else seed = strtoull(argv[i], &end, 10);
            bool good = isdigit((unsigned char)argv[i][0]) && *end == 0 && megabytes > 0 && megabytes <= 1e6;
            if (!good) fail(a + " " + argv[i] + (mb ? ": not a size in megabytes; " : ": not a whole number; ") + usage);
        } else if (a.size() > 1 && a[0] == '-') fail("unknown option " + a + "; " + usage);
        else if (path.empty()) path = a;
        else fail("more than one output file; " + string(usage));
    }
    if (path.empty()) fail(usage);

    Grammar grammar = compile(grammar_text);
    Writer w(grammar, seed);
    const int story_rule = grammar.rule("story");
    const uint64_t wanted = (uint64_t)std::llround(megabytes * 1e6);

    // Written under another name first: whoever sees OUT.txt sees all of it.
    string unfinished = path + ".tmp";
    FILE* file = fopen(unfinished.c_str(), "wb");
    if (!file) fail("cannot write " + unfinished + ": " + strerror(errno));
    uint64_t bytes = 0, stories = 0;
    bool ok = true;
    while (ok && bytes + w.out.size() < wanted) {
        w.story++;
        stories++;
        w.write(story_rule, PLAIN);
        w.out += "\n\n";
        if (w.out.size() > 1u << 20 || bytes + w.out.size() >= wanted) {
            ok = fwrite(w.out.data(), 1, w.out.size(), file) == w.out.size();
            bytes += w.out.size();
            w.out.clear();
        }
    }
    ok = fclose(file) == 0 && ok;
    if (!ok || rename(unfinished.c_str(), path.c_str()) != 0) {
        string why = strerror(errno);
        remove(unfinished.c_str());
        fail("cannot write " + path + ": " + why);
    }

    string digits = std::to_string(stories);
    for (int at = (int)digits.size() - 3; at > 0; at -= 3) digits.insert(at, ",");
    double rate = w.bits / (double)bytes;
    string shown = path.substr(path.rfind('/') == string::npos ? 0 : path.rfind('/') + 1);
    printf("%s: %.1f MB, %s stories, entropy rate <= %.4f bits (%.4f nats) per byte\n",
        shown.c_str(), (double)bytes / 1e6, digits.c_str(), rate, rate * std::log(2.0));
}
