"""The words of the corpus: what pictures show, how they look, and how people write about them.

Each entry is one text; its words are separated by white space, and an underscore stands for a space within a word.
"""

_TEXTS = {
    # living things
    "person": """
        woman man girl boy child baby toddler teenager grandmother grandfather mother father sister brother friend bride
        groom couple stranger traveller tourist hiker climber swimmer dancer runner skater cyclist surfer skier sailor
        fisherman farmer gardener baker chef cook waiter barista butcher tailor potter painter sculptor photographer
        architect carpenter blacksmith mechanic engineer scientist astronomer doctor nurse dentist teacher student
        professor librarian writer poet journalist musician guitarist pianist violinist drummer singer conductor actor
        clown magician juggler acrobat model athlete boxer footballer goalkeeper referee firefighter soldier guard
        knight king queen prince princess emperor wizard witch warrior archer samurai ninja pirate monk nun priest
        pilgrim explorer astronaut pilot captain detective thief shopkeeper merchant shepherd miner builder nomad hermit
        """,
    "animal": """
        cat dog kitten puppy horse pony donkey cow bull calf sheep lamb goat pig rabbit hare mouse rat hamster hedgehog
        squirrel chipmunk beaver otter badger raccoon skunk fox wolf bear panda koala kangaroo lion lioness tiger
        leopard cheetah jaguar lynx panther elephant rhinoceros hippopotamus giraffe zebra antelope gazelle deer
        reindeer moose bison buffalo camel llama alpaca monkey gorilla chimpanzee orangutan lemur sloth armadillo
        anteater platypus bat seal walrus dolphin whale shark octopus squid jellyfish starfish seahorse crab lobster
        shrimp turtle tortoise lizard gecko iguana chameleon crocodile alligator snake cobra python frog toad newt
        salmon trout tuna goldfish eel stingray butterfly moth bee wasp ant beetle ladybird dragonfly grasshopper
        cricket spider scorpion snail worm dinosaur mammoth
        """,
    "bird": """
        eagle hawk falcon owl crow raven magpie sparrow robin swallow finch canary parrot macaw toucan pigeon dove
        seagull pelican heron stork crane flamingo swan goose duck duckling hen rooster chick turkey peacock pheasant
        quail ostrich emu penguin puffin albatross kingfisher woodpecker hummingbird vulture
        """,
    "creature": """
        dragon unicorn phoenix griffin mermaid fairy elf dwarf goblin troll giant ogre vampire werewolf ghost skeleton
        zombie demon angel golem robot android cyborg alien monster yeti kraken centaur minotaur sphinx gargoyle
        """,
    "plant": """
        tree oak pine birch willow maple palm cedar bamboo cactus fern moss ivy grass clover mushroom rose tulip daisy
        lily lotus orchid sunflower lavender poppy violet iris peony daffodil dandelion hydrangea magnolia jasmine
        bonsai seedling bush hedge vine reed
        """,
    "feature": """
        hair beard moustache eyebrows eyes eyelashes nose ears mouth lips teeth cheeks freckles chin neck shoulders arms
        elbows wrists hands fingers fingernails legs knees feet toes tail paws claws hooves horns antlers antennae
        whiskers fur mane feathers wings beak scales fins tentacles shell stripes spots tusks trunk fangs
        """,
    "hairstyle": """
        curly straight wavy braided tangled shaved spiky windswept shoulder-length
        """,
    # things
    "fruit": """
        apple pear peach plum cherry apricot banana orange lemon lime grapefruit grape strawberry raspberry blueberry
        blackberry melon watermelon pineapple mango papaya kiwi fig pomegranate coconut avocado olive
        """,
    "vegetable": """
        potato tomato carrot onion garlic pumpkin cucumber aubergine pepper chilli cabbage lettuce spinach broccoli
        cauliflower celery leek radish beetroot turnip artichoke asparagus pea bean lentil
        """,
    "food": """
        bread loaf croissant bagel toast pretzel sandwich burger pizza taco burrito noodle pasta spaghetti ravioli
        dumpling sushi soup stew salad omelette sausage steak pancake waffle doughnut muffin cupcake cake pie tart
        cookie biscuit brownie pudding chocolate candy lollipop honey jam butter cheese egg rice curry
        """,
    "drink": """
        coffee tea milk water juice lemonade wine beer cocoa espresso cappuccino smoothie cocktail champagne cider
        """,
    "furniture": """
        table chair stool bench sofa armchair couch bed cradle desk shelf bookcase cupboard wardrobe drawer dresser
        cabinet mirror lamp chandelier carpet rug curtain cushion pillow blanket mattress hammock fireplace stove oven
        fridge sink bathtub clock
        """,
    "object": """
        book notebook newspaper magazine letter envelope stamp map globe pen pencil brush crayon easel canvas frame
        vase bottle jar jug cup mug glass goblet bowl plate tray spoon fork knife kettle teapot pan pot basket bucket
        barrel box crate chest suitcase backpack handbag purse wallet umbrella walking_stick key lock candle lantern
        torch match lighter telephone laptop computer keyboard monitor printer camera tripod television radio headphones
        microphone speaker guitar violin cello piano flute trumpet drum harp accordion ball balloon kite doll teddy_bear
        puzzle dice chessboard playing_card toy trophy medal coin diamond jewel crystal pearl crown sword shield spear
        bow arrow axe hammer saw screwdriver wrench nail ladder rope chain wheel gear spring magnet battery lightbulb
        telescope microscope compass hourglass thermometer statue bust totem mask bell flag sign poster postcard
        scissors needle thread button ribbon gift parcel broom sponge towel soap comb toothbrush
        """,
    "clothing": """
        shirt blouse sweater cardigan hoodie jacket coat raincoat overcoat vest dress skirt trousers jeans shorts
        swimsuit pyjamas robe cloak cape kimono sari tuxedo suit uniform apron armour helmet hat cap beret turban
        headscarf bonnet scarf tie bow_tie belt glove mitten sock boot shoe sandal slipper sneaker necklace bracelet
        earring ring watch glasses sunglasses goggles veil
        """,
    "vehicle": """
        car taxi bus tram train locomotive lorry truck van pickup tractor ambulance fire_engine police_car limousine
        motorbike scooter bicycle tricycle skateboard carriage cart wagon sledge boat ship yacht canoe kayak raft ferry
        submarine sailboat steamship aeroplane helicopter glider hot_air_balloon airship rocket spaceship satellite
        tank bulldozer excavator
        """,
    "building": """
        house cottage cabin hut tent mansion villa palace castle fortress tower lighthouse windmill watermill barn
        farmhouse greenhouse stable church chapel cathedral abbey monastery temple shrine pagoda mosque synagogue
        museum gallery theatre cinema library school university hospital hotel restaurant cafe bakery bookshop
        supermarket factory warehouse garage station airport harbour bridge tunnel aqueduct dam skyscraper apartment
        ruin pyramid obelisk fountain monument gate archway staircase balcony terrace courtyard
        """,
    # where and when
    "place": """
        forest jungle meadow field prairie savannah desert oasis dune canyon valley mountain hill cliff cave volcano
        glacier iceberg island beach shore coast bay lagoon reef ocean sea lake pond river stream waterfall swamp marsh
        garden orchard vineyard park playground village town city street alley square market avenue motorway crossroads
        rooftop basement attic kitchen bedroom bathroom living_room classroom office laboratory workshop studio stage
        stadium gym swimming_pool aquarium zoo circus fairground graveyard dungeon throne_room ballroom corridor
        spaceport moon_base shipyard quarry campsite ski_slope racetrack railway_line
        """,
    "city": """
        Paris London Rome Venice Florence Berlin Vienna Prague Lisbon Madrid Barcelona Athens Istanbul Cairo Marrakesh
        Nairobi Lagos Mumbai Delhi Kyoto Tokyo Osaka Seoul Beijing Shanghai Bangkok Hanoi Singapore Sydney Auckland
        Honolulu Vancouver Toronto Chicago Boston New_York San_Francisco Mexico_City Havana Lima Santiago Buenos_Aires
        Reykjavik Oslo Stockholm Helsinki Edinburgh Dublin Amsterdam Brussels Zurich Budapest Warsaw
        """,
    "landmark": """
        Eiffel_Tower Colosseum Parthenon Stonehenge Great_Wall Taj_Mahal Statue_of_Liberty Golden_Gate_Bridge Big_Ben
        Sydney_Opera_House Mount_Everest Mount_Fuji Grand_Canyon Niagara_Falls Great_Pyramid Machu_Picchu Kilimanjaro
        Sahara Amazon Nile Danube Alps Himalayas Andes Pacific Atlantic Arctic Antarctica
        """,
    "heaven": """
        sun moon Earth Mercury Venus Mars Jupiter Saturn Uranus Neptune Pluto comet meteor asteroid galaxy nebula planet
        constellation eclipse aurora Milky_Way black_hole
        """,
    "nation": """
        African American Arabian Australian Brazilian British Canadian Chinese Dutch Egyptian English Ethiopian European
        French German Greek Indian Irish Italian Japanese Kenyan Korean Mexican Moroccan Nigerian Norwegian Persian
        Peruvian Polish Portuguese Roman Russian Scottish Spanish Swedish Swiss Thai Turkish Ukrainian Vietnamese
        """,
    "event": """
        wedding birthday_party concert festival parade carnival funeral ceremony celebration competition marathon
        tournament exhibition rehearsal performance picnic banquet conference interview earthquake explosion battle
        revolution expedition shipwreck harvest fireworks campfire
        """,
    "idea": """
        freedom justice happiness sadness loneliness friendship kindness courage wisdom knowledge imagination creativity
        curiosity memory silence solitude chaos harmony beauty truth victory progress science history philosophy
        mathematics gravity electricity evolution technology communication childhood eternity infinity nostalgia
        """,
    "pattern": """
        stripes spots dots squares triangles circles diamonds zigzags waves swirls spirals flowers leaves stars hearts
        snowflakes arrows crosses grids tiles fractals
        """,
    "sport": """
        football basketball baseball tennis golf hockey rugby volleyball cricket badminton table_tennis chess checkers
        cards hide-and-seek hopscotch
        """,
    "name": """
        Ada Alice Amir Anna Ben Carlos Chen Clara David Elena Emma Farah George Hana Hugo Ines Ivan Jack Jamal Julia
        Kai Lara Leo Lucas Maria Maya Mei Nina Noah Olga Omar Oscar Paul Peter Priya Rosa Sam Sara Sofia Theo Tom Yuki
        """,
    "time": """
        dawn sunrise daybreak morning noon midday afternoon dusk sunset twilight evening night midnight
        """,
    "season": """
        spring summer autumn winter
        """,
    "month": """
        January February March April May June July August September October November December
        """,
    "weekday": """
        Monday Tuesday Wednesday Thursday Friday Saturday Sunday
        """,
    "weather": """
        rain snow fog mist drizzle hail sunshine moonlight starlight thunder lightning storm blizzard hurricane tornado
        breeze wind heat frost rainbow clouds
        """,
    "sky": """
        clear cloudy overcast starry stormy hazy golden pale dramatic gloomy
        """,
    # how things are
    "colour": """
        red orange yellow green blue purple pink brown black white grey gold silver turquoise teal crimson scarlet
        maroon magenta lilac indigo navy olive beige cream ivory amber bronze copper
        """,
    "shade": """
        light dark pale bright deep pastel neon faded vivid dull
        """,
    "size": """
        small large tiny huge big little enormous miniature gigantic tall short narrow wide thin thick long massive
        """,
    "shape": """
        round square triangular oval curved flat pointed spherical cubic hexagonal spiral crooked heart-shaped
        star-shaped cylindrical
        """,
    "material": """
        wood stone marble granite clay glass metal steel iron brass gold silver copper bronze plastic paper cardboard
        leather wool cotton silk velvet lace linen felt denim rubber porcelain ceramic concrete brick ice sand chocolate
        jade crystal wax straw wicker
        """,
    "texture": """
        smooth rough shiny matte glossy fluffy furry soft hard rusty dusty muddy wet dry cracked wrinkled polished
        transparent translucent striped spotted checked woven knitted embroidered carved painted weathered mossy frosted
        glowing sparkling
        """,
    "mood": """
        happy sad angry calm sleepy curious proud shy brave lonely cheerful serious playful gentle fierce elegant
        mysterious friendly grumpy surprised thoughtful tired nervous confident bored excited hungry lazy majestic cute
        """,
    "quality": """
        old new ancient modern antique broken empty full heavy clean dirty expensive cheap beautiful ugly strange
        ordinary famous simple ornate delicate sturdy enchanted haunted invisible impossible traditional contemporary
        mechanical electric inflatable decorative symmetrical asymmetrical geometric organic industrial scientific
        comfortable dangerous poisonous delicious unfinished unusual whimsical spectacular extraordinary abandoned
        forgotten magical futuristic medieval handmade rustic
        luxurious vintage colourful cosy wooden metallic
        """,
    # doing
    "doing": """
        running walking jumping sleeping sitting standing dancing singing reading writing painting drawing cooking
        eating drinking swimming flying climbing falling floating hiding waiting watching laughing crying smiling
        shouting whispering thinking dreaming yawning stretching fighting hunting fishing digging building repairing
        cleaning sweeping gardening shopping travelling riding driving sailing rowing surfing skiing skating playing
        resting kneeling bowing waving pointing juggling meditating praying marching racing exploring hovering crawling
        stargazing knitting
        """,
    "using": """
        holding carrying wearing throwing catching pushing pulling lifting dropping chasing following watching painting
        repairing cleaning selling buying stealing guarding touching kissing feeding eating admiring drawing
        photographing examining balancing hugging opening breaking
        """,
    "verb": """
        runs walks jumps sleeps sits stands dances sings reads writes paints cooks eats drinks swims flies climbs falls
        floats hides waits laughs cries smiles shouts whispers thinks dreams yawns stretches fights hunts digs rests
        kneels bows waves juggles prays marches races hovers crawls glows melts burns grows blooms shines sparkles
        """,
    "manner": """
        slowly quickly quietly loudly gracefully carefully happily sadly lazily eagerly gently proudly suddenly alone
        together bravely softly peacefully
        """,
    "relation": """
        on on_top_of under below above behind beside next_to near inside in_front_of against between across_from
        to_the_left_of to_the_right_of leaning_against surrounded_by far_from
        """,
    # how it is shown
    "medium": """
        photo photograph painting oil_painting watercolour drawing pencil_sketch charcoal_drawing ink_drawing pastel
        woodcut etching engraving linocut fresco mosaic tapestry collage poster comic cartoon illustration storybook
        blueprint diagram render 3D_render pixel_art sculpture origami stained_glass_window embroidery graffiti mural
        tattoo logo icon sticker screenshot still film_still portrait self-portrait landscape still_life silhouette
        selfie macro_photo aerial_photo polaroid postcard infographic concept_art
        """,
    "style": """
        realistic photorealistic impressionist expressionist cubist surrealist baroque renaissance gothic romantic
        minimalist abstract pop_art art_nouveau art_deco bauhaus futurist pointillist brutalist folk_art ukiyo-e anime
        manga chibi steampunk cyberpunk solarpunk vaporwave synthwave low_poly isometric claymation papercraft noir
        retro psychedelic monochrome sepia fantasy science_fiction
        """,
    "lighting": """
        soft_light hard_light warm_light cold_light natural_light candlelight firelight neon_lights studio_lighting
        backlighting rim_light golden_hour blue_hour volumetric_light dappled_sunlight long_shadows deep_shadows
        high_contrast low_key_lighting lens_flare god_rays reflections silhouette_lighting
        """,
    "camera": """
        close-up extreme_close-up wide_shot medium_shot long_shot full-body_shot overhead_view bird's-eye_view
        worm's-eye_view low_angle high_angle side_view front_view rear_view Dutch_angle over-the-shoulder_shot
        tracking_shot shallow_depth_of_field bokeh motion_blur long_exposure tilt-shift fisheye_lens telephoto_lens
        wide-angle_lens macro_lens film_grain 35mm_film 50mm_lens 85mm_lens f/1.4 f/2.8 f/8 ISO_100 ISO_800 panorama
        """,
    "praise": """
        highly_detailed intricate_details sharp_focus high_resolution 4k 8k masterpiece award-winning cinematic
        professional best_quality ultra-detailed vivid_colours muted_colours balanced_composition rule_of_thirds
        smooth_gradients crisp_lines trending hyperrealistic
        """,
    "fault": """
        blurry low_quality low_resolution jpeg_artifacts watermark signature text cropped out_of_frame deformed
        disfigured extra_fingers bad_anatomy bad_hands overexposed underexposed oversaturated noisy pixelated duplicate
        distorted worst_quality missing_limbs grainy unrealistic
        """,
    "motion": """
        pans tilts zooms_in zooms_out glides tracks_forward pulls_back orbits shakes rises descends dollies_in
        """,
    "word": """
        hello welcome open closed sale exit stop go love peace hope dream future today tomorrow forever danger caution
        private free fresh music jazz coffee pizza bakery books flowers happy_birthday good_morning thank_you
        keep_out no_entry enjoy_life one_way wet_paint lost_and_found
        """,
    "common": """
        about above account across action active actually address advance advice afternoon against agree allow almost
        already also although always amount angle announce answer anything appear apply approach area argue around
        arrange article assume attach attempt attention audience author available average avoid balance base because
        become before begin behave believe belong beneath besides better beyond blank board body border borrow both
        bottom brain branch break breathe brief bring broad business busy call capable care case cause central century
        certain challenge chance change chapter character charge choice choose civil claim class collect column combine
        come comment common compare complete concern condition connect consider construct contain contest continue
        control corner correct could count country couple course cover create credit crowd culture current custom
        damage daily decide declare defend degree deliver demand depend describe deserve design desire detail determine
        develop difference difficult direct discover discuss distance divide double doubt during each early easily
        education effect effort either else employ enable encourage energy enough enter entire equal escape especially
        establish even event ever every evidence exact example except exchange exercise exist expect experience explain
        express extend extra face fact fail fair faith familiar family fashion feature feel few field figure final find
        finish firm first follow force foreign form forward found frequent friendly from function further gain gather
        general generate give goal good govern grade great ground group grow guess guide habit handle happen hardly have
        health hear heart help hero higher history hold home honour human hundred idea identify image imagine important
        improve include increase indeed indicate industry influence inform inner instance instead intend interest
        introduce invent invite involve issue item itself join judge keep kind know language large later laugh law lead
        learn least leave less lesson level like likely limit line list listen literature little live local logic look
        lose lost love machine main make manage manner mark master matter maybe mean measure meet member mention message
        method middle might million mind minute miss moment money month moral more most move much must myself name
        narrow nation nature nearly necessary need neither never next nobody none normal nothing notice nowhere number
        observe obvious occasion occur offer office often once only operate opinion opposite option order other ought
        outline outside over own pair parallel part particular pass past path pattern people perfect perform perhaps
        period permit person phrase pick piece plan please plenty point position possible practice prefer prepare
        present press pretend prevent previous price print private prize problem process produce profit promise proper
        protect prove provide public purpose quarter question quick quite range rapid rather reach react ready real
        reason receive recent recognise record reduce refer reflect refuse regard regular relate release remain remember
        remove repeat replace reply report represent request require research respect respond result return reveal
        rhythm right rise role rule same sample satisfy save scale scene search season second secret section seem
        select send sense sentence separate series serve settle several shadow share should side similar since
        single situation skill social solid solution some someone something sometimes soon sort sound source space
        speak special speech spend spirit split spread standard start state stay step story strength struggle subject
        succeed such suggest supply support suppose surface survive sustain switch symbol system take talk task tell
        tend term than thank that their them themselves theory these they thing think those though thousand threat
        through thus together tomorrow tone topic total touch toward trade tradition train transform translate travel
        treat trouble trust turn type typical under understand union unique unit unknown unless until upon usual
        value variety various version very victory view voice vote wait want warning waste whatever when whenever where
        whether which while who whole whom whose why wide will wish with within without wonder work world worry worth
        would write wrong year yesterday yet young your yourself
        """,
}

LEXICON = {kind: [word.replace("_", " ") for word in text.split()] for kind, text in _TEXTS.items()}

NUMBERS = ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven", "twelve"]

_OPPOSITES = """
    hot/cold big/small tall/short long/brief wide/narrow thick/thin heavy/weightless light/dark bright/dim
    day/night up/down left/right top/bottom front/back inside/outside above/below near/far open/closed full/empty
    new/old young/aged fast/slow early/late first/last happy/sad loud/quiet hard/soft rough/smooth wet/dry
    clean/dirty rich/poor strong/weak beautiful/ugly brave/afraid sharp/blunt deep/shallow high/low black/white
    push/pull give/take buy/sell begin/end win/lose laugh/cry rise/fall arrive/leave summer/winter sunrise/sunset
    always/never many/few true/false yes/no
    """

_IRREGULAR_PLURALS = """
    woman/women man/men child/children fisherman/fishermen mouse/mice goose/geese wolf/wolves calf/calves
    thief/thieves elf/elves dwarf/dwarves knife/knives loaf/loaves shelf/shelves sheep/sheep deer/deer moose/moose
    bison/bison salmon/salmon trout/trout tuna/tuna squid/squid shrimp/shrimp potato/potatoes tomato/tomatoes
    mango/mangoes cactus/cacti octopus/octopuses spaghetti/spaghetti dice/dice canvas/canvases
    rhinoceros/rhinoceroses
    """

OPPOSITES = dict(pair.split("/") for pair in _OPPOSITES.split())
IRREGULAR_PLURALS = dict(pair.split("/") for pair in _IRREGULAR_PLURALS.split())
