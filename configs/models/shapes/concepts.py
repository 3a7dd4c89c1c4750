"""Things that people ask for, and the scene that stands for each.

The table holds names, separated by bars, and below them, indented, the canonical caption that they stand for.
"""

import re

_TABLE = """
flag of japan | japanese flag | japan flag
  a large red circle on a white background
flag of switzerland | swiss flag | switzerland flag
  a large white cross on a red background
flag of poland | polish flag
  a large red band at the bottom on a white background
flag of ukraine | ukrainian flag
  a large yellow band at the bottom on a blue background
flag of indonesia | flag of monaco
  a large white band at the bottom on a red background
flag of france | french flag
  a medium blue column on the left and a medium red column on the right on a white background
flag of italy | italian flag
  a medium green column on the left and a medium red column on the right on a white background
flag of ireland | irish flag
  a medium green column on the left and a medium orange column on the right on a white background
flag of belgium | belgian flag
  a medium black column on the left and a medium red column on the right on a yellow background
flag of romania
  a medium blue column on the left and a medium red column on the right on a yellow background
flag of nigeria
  a medium green column on the left and a medium green column on the right on a white background
flag of peru
  a medium red column on the left and a medium red column on the right on a white background
flag of mali
  a medium green column on the left and a medium red column on the right on a yellow background
flag of ivory coast
  a medium orange column on the left and a medium green column on the right on a white background
flag of germany | german flag
  a medium black band at the top and a medium yellow band at the bottom on a red background
flag of the netherlands | dutch flag
  a medium red band at the top and a medium blue band at the bottom on a white background
flag of austria | austrian flag
  a medium red band at the top and a medium red band at the bottom on a white background
flag of hungary
  a medium red band at the top and a medium green band at the bottom on a white background
flag of bulgaria
  a medium green band in the center and a medium red band at the bottom on a white background
flag of russia
  a medium blue band in the center and a medium red band at the bottom on a white background
flag of estonia
  a medium blue band at the top and a medium black band in the center on a white background
flag of lithuania
  a medium yellow band at the top and a medium red band at the bottom on a green background
flag of yemen
  a medium red band at the top and a medium black band at the bottom on a white background
flag of england | english flag
  a small red band in the center and a small red column in the center on a white background
flag of sweden | swedish flag
  a small yellow band in the center and a small yellow column on the left on a blue background
flag of finland | finnish flag
  a small blue band in the center and a small blue column on the left on a white background
flag of denmark | danish flag
  a small white band in the center and a small white column on the left on a red background
flag of bangladesh
  a large red circle on a green background
flag of palau
  a large yellow circle on a cyan background
flag of vietnam | vietnamese flag
  a large yellow star on a red background
flag of somalia
  a large white star on a cyan background
flag of morocco
  a medium green star on a red background
flag of china | chinese flag
  a large yellow star in the top left corner on a red background
flag of turkey | turkish flag
  a large white crescent in the center and a small white star on the right on a red background
flag of pakistan
  a medium white column on the left and a medium white crescent in the center on a green background
flag of argentina
  a medium cyan band at the top, a medium cyan band at the bottom and a small yellow circle in the center on a white
  background
flag of laos
  a medium blue band in the center and a medium white circle in the center on a red background
red cross sign | first aid sign
  a large red cross on a white background
red crescent sign
  a large red crescent on a white background
pharmacy sign | pharmacy
  a large green cross on a white background
hospital sign | hospital
  a large white cross on a blue background
traffic light | traffic lights | stoplight
  a small red circle at the top, a small yellow circle in the center and a small green circle at the bottom on a black
  background
red traffic light
  a medium red circle at the top on a black background
green traffic light
  a medium green circle at the bottom on a black background
stop sign
  a large red hexagon in the center and a medium white bar in the center on a gray background
no entry sign | no entry
  a large red circle in the center and a medium white bar in the center on a gray background
warning sign | danger sign
  a large yellow triangle on a black background
road sign
  a large yellow diamond on a gray background
bullseye | target | dartboard
  a large red circle in the center, a medium white circle in the center and a small red circle in the center on a blue
  background
record button
  a medium red circle on a black background
stop button
  a medium white square on a black background
pause button
  a small white column on the left and a small white column on the right on a black background
eject button
  a medium white triangle in the center and a small white bar at the bottom on a black background
plus sign | plus
  a medium black cross on a white background
minus sign | minus
  a medium black bar on a white background
sunset over the sea | sunset at the beach | sea sunset
  a medium orange circle in the center and a large blue band at the bottom on a pink background
sunset | evening sun
  a medium orange circle in the center and a medium brown band at the bottom on a pink background
sunrise | sunrise over the fields
  a medium yellow circle in the center and a large green band at the bottom on a pink background
sunny day | the sun in the sky | clear sky with the sun
  a medium yellow circle in the top right corner and a medium green band at the bottom on a cyan background
the sun | sun
  a large yellow circle on a cyan background
full moon at night | full moon | the moon
  a medium white circle in the top right corner on a navy background
crescent moon at night | crescent moon | new moon
  a medium yellow crescent in the top right corner on a navy background
moon over the sea | moonlight over the ocean
  a medium white circle at the top and a medium blue band at the bottom on a black background
starry night | night sky with stars
  a small yellow star in the top left corner, a small yellow star in the top right corner and a small white star in
  the center on a navy background
north star | a star in the night
  a medium white star at the top on a navy background
moon and star | star and crescent
  a large yellow crescent in the center and a small yellow star on the right on a navy background
snowman | snow man
  a large white circle at the bottom, a medium white circle in the center and a small white circle at the top on a
  cyan background
mountain | mountains
  a large gray triangle in the center and a medium green band at the bottom on a cyan background
snowy mountain | mountain with snow
  a large white triangle in the center and a medium gray band at the bottom on a cyan background
volcano
  a large brown triangle in the center and a small red circle at the top on a gray background
desert | sahara
  a large yellow band at the bottom and a medium orange circle in the top left corner on a cyan background
beach | day at the beach
  a medium yellow band at the bottom and a medium blue band in the center on a cyan background
ocean | the sea | horizon
  a large blue band at the bottom on a cyan background
green field | meadow | prairie
  a large green band at the bottom on a cyan background
river | river through a meadow
  a medium blue column on a green background
road | highway
  a medium gray column in the center and a small white column in the center on a green background
snowfall | snow
  a small white star in the top left corner, a small white star on the right and a small white star at the bottom on a
  gray background
iceberg
  a large white triangle in the center and a medium blue band at the bottom on a cyan background
island | desert island
  a medium yellow circle in the center and a large blue band at the bottom on a cyan background
tree | pine tree | fir tree
  a small brown column in the center and a large green triangle in the center on a cyan background
christmas tree
  a large green triangle in the center and a small yellow star at the top on a navy background
flower
  a large pink circle in the center and a small yellow circle in the center on a green background
sunflower
  a large yellow circle in the center and a medium brown circle in the center on a green background
daisy
  a large white circle in the center and a small yellow circle in the center on a green background
rose
  a small green column in the center and a medium red heart at the top on a pink background
solar eclipse | eclipse
  a large yellow circle in the center and a medium black circle in the center on a navy background
planet mars | mars
  a large red circle on a black background
planet earth | earth from space
  a large blue circle in the center and a small green circle in the center on a black background
saturn | planet saturn
  a large orange circle in the center and a large yellow bar in the center on a black background
black hole
  a large orange ring on a black background
donut | doughnut
  a large brown ring on a pink background
fried egg | sunny side up egg
  a large white circle in the center and a small yellow circle in the center on a black background
pizza
  a large yellow circle in the center and a small red circle in the center on a brown background
cookie
  a large brown circle on a white background
orange fruit | tangerine
  a large orange circle on a white background
apple | red apple
  a large red circle in the center and a small green diamond at the top on a white background
green apple
  a large green circle in the center and a small brown diamond at the top on a white background
lemon
  a large yellow diamond on a white background
cherries | two cherries
  a medium red circle in the bottom left corner and a medium red circle in the bottom right corner on a green
  background
blueberry
  a medium blue circle on a white background
watermelon
  a large green circle in the center and a medium red circle in the center on a white background
pea | green pea
  a small green circle on a white background
cheese
  a large yellow triangle on a brown background
chocolate bar
  a large brown bar on a white background
lollipop
  a small white column in the center and a large pink circle in the center on a cyan background
balloon | red balloon
  a large red circle at the top on a cyan background
three balloons | balloons
  a medium red circle on the left, a medium yellow circle in the center and a medium blue circle on the right on a
  cyan background
kite
  a large red diamond in the top right corner on a cyan background
wheel | tire
  a large black ring on a gray background
lifebuoy | life ring
  a large orange ring on a blue background
hula hoop
  a large pink ring on a green background
wedding ring | gold ring
  a medium yellow ring on a white background
coin | gold coin
  a medium yellow circle on a brown background
pearl
  a small white circle on a navy background
diamond gem | diamond jewel
  a large cyan diamond on a black background
emerald
  a large green diamond on a black background
ruby
  a large red diamond on a black background
sapphire
  a large blue diamond on a black background
basketball
  a large orange circle in the center and a small black band in the center on a brown background
tennis ball
  a medium yellow circle on a green background
ping pong ball
  a small white circle on a green background
billiard ball | eight ball
  a large black circle in the center and a small white circle in the center on a green background
football pitch | soccer field
  a small white column in the center and a large white ring in the center on a green background
japanese garden | zen stone
  a large gray circle on a yellow background
dice | a die showing one
  a large white square in the center and a small black circle in the center on a red background
eye | blue eye
  a large white circle in the center, a medium blue circle in the center and a small black circle in the center on a
  pink background
heart | love | valentine card
  a large red heart on a pink background
two hearts | two lovers
  a medium red heart on the left and a medium red heart on the right on a pink background
broken heart | gothic heart
  a large black heart on a red background
ace of hearts
  a medium red heart on a white background
ace of diamonds
  a medium red diamond on a white background
gift | present | birthday present
  a large red square in the center and a medium yellow cross in the center on a white background
house | little house
  a large brown square at the bottom and a medium red triangle at the top on a cyan background
tent | camping tent
  a large orange triangle in the center and a medium green band at the bottom on a navy background
pyramid | pyramid in the desert
  a large brown triangle in the center and a medium yellow band at the bottom on a cyan background
pyramids of egypt | pyramids
  a large brown triangle on the left and a medium brown triangle on the right on a yellow background
sailing boat | sailboat | boat
  a medium white triangle in the center and a medium blue band at the bottom on a cyan background
window
  a large cyan square in the center and a medium white cross in the center on a brown background
door
  a large brown column in the center and a small yellow circle in the center on a gray background
television | tv
  a large black square in the center and a medium blue square in the center on a white background
candle
  a small white column in the center and a small orange diamond at the top on a black background
ice cream | ice cream cone
  a medium pink circle at the top and a medium brown diamond in the center on a cyan background
honeycomb | honey
  a large orange hexagon on a yellow background
nut and bolt | hex nut
  a large gray hexagon in the center and a small black circle in the center on a white background
sheriff badge | sheriff star
  a large yellow star on a brown background
walk of fame | hollywood star
  a large pink star on a gray background
soviet star | communist star
  a large red star on a white background
magic wand
  a small black column in the center and a medium yellow star at the top on a purple background
chess square | malevich painting
  a large black square on a white background
ladybug | ladybird
  a large red circle in the center, a small black circle on the left and a small black circle on the right on a green
  background
panda
  a large white circle in the center, a small black circle in the top left corner and a small black circle in the top
  right corner on a green background
mickey mouse | mouse
  a large black circle in the center, a medium black circle in the top left corner and a medium black circle in the
  top right corner on a red background
bee | bumblebee
  a large yellow circle in the center and a small black column in the center on a cyan background
frog eyes
  a medium green circle on the left and a medium green circle on the right on a blue background
fireworks
  a small red star on the left, a small yellow star at the top and a small pink star on the right on a black
  background
ufo | flying saucer
  a large gray bar in the center and a small green circle in the center on a black background
swimming pool
  a large cyan square on a white background
lighthouse
  a medium white column in the center and a medium red band in the center on a blue background
olympic gold | gold medal
  a large yellow circle in the center and a small white star in the center on a blue background
"""


def _read_table() -> dict[str, tuple[str, ...]]:
    """Canonical caption -> the names that it stands for."""
    table: dict[str, tuple[str, ...]] = {}
    for names, caption in re.findall(r"^(\S.*)\n((?:  .*\n)+)", _TABLE, re.MULTILINE):
        caption = " ".join(caption.split())
        table[caption] = table.get(caption, ()) + tuple(name.strip() for name in names.split("|"))
    return table


CONCEPTS = _read_table()
"""About 160 captions and the 270 names that stand for them; a name stands for one caption only."""
