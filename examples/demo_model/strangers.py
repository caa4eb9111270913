"""Questions that the demo does not know: what people ask of a chat model, and plain nonsense.

Only some are listed; the rest are put together from parts, so that what is learnt is "not one of mine", not the list.
"""

from __future__ import annotations

from random import Random

_FULL = {
    "en": """Hello|Hi|Hello, how are you?|Good morning!|Who are you?|What can you do?|Thank you.|Tell me a joke.
Write a poem.|Why is the sky blue?|What time is it?|What is 2 plus 2?|What is the meaning of life?
How do I bake bread?|Sing a song.|Can you help me?|What is your name?|How old are you?|Do you like music?
Who won the game?|What day is it today?|Explain.|Is it raining?|How do planes fly?|Who wrote Hamlet?
Where is the station?|Give me a recipe.|Translate this.|I am hungry.|What breed is this dog?|Who painted this?
Where was this photo taken?|Is this a cat?|How many people are there?|test|What animal is this?|What is the man doing?
How many cars are there?|What brand is this?|Summarise this text.|What's up?|Are you a robot?
Write a story about a dragon.|Count to ten.|What is Python?|Fix my code.|How much does it cost?|ok|yes|no
Which country is this?|What is the weather like?|How many dogs do you see?|What colour is the car?|Is she happy?|asdf
What is the capital of France?|The capital of France is|Once upon a time|Is this picture real?|Who made you?|help""",
    "zh": """你好|你是谁？|今天天气怎么样？|写一首诗。|法国的首都是哪里？|谢谢。|你会做什么？|讲个笑话。|现在几点？
你叫什么名字？|天空为什么是蓝色的？|这是谁画的？|这只狗是什么品种？|有几个人？|一加一等于几？|请翻译。|怎么做面包？
帮帮我。|图中有几只猫？|早上好|这张照片在哪里拍的？|给我讲个故事。|你喜欢音乐吗？|这辆车多少钱？|谁赢了比赛？
什么是人工智能？|再见|总结一下。""",
    "es": """Hola|¿Quién eres?|¿Cómo estás?|¿Qué tiempo hace?|Escribe un poema.|¿Cuál es la capital de Francia?
Gracias.|¿Qué puedes hacer?|Cuéntame un chiste.|¿Qué hora es?|¿Cómo te llamas?|¿Por qué el cielo es azul?
¿Quién pintó esto?|¿De qué raza es este perro?|¿Cuántas personas hay?|¿Cuánto es dos más dos?|Traduce esto.
¿Cómo se hace el pan?|Ayúdame.|¿Cuántos gatos hay?|Buenos días|¿Dónde está la estación?|¿Te gusta la música?
¿Quién ganó el partido?|¿Qué es esto en inglés?|¿De qué color es el coche?|¿Cuánto cuesta?|Adiós|Resume el texto.
¿Qué animal es?""",
}
_FULL = {language: lines.replace("\n", "|") for language, lines in _FULL.items()}

_FRAMES = {
    "en": """What is a {}?|Who is {}?|Tell me about {}.|How does a {} work?|Where is the {}?|Is there a {}?
Write about {}.|Do you see a {}?|What is the {} of {}?|How many {}s are there?|What colour is the {}?
Why is the {} so {}?|Can you {} the {}?|Which {} is this?|Is this a {}?|What kind of {} is this?|When did {} {}?
Explain {} to me.|Should I buy a {}?|How do I {} a {}?|I like {}.|{}|What does {} mean?|Give me a {} and a {}.
Who invented the {}?|What is left of the {}?|How big is the {}?|Please {} this {}.""",
    "zh": """什么是{}？|{}在哪里？|介绍一下{}。|{}怎么用？|图中有{}吗？|有几个{}？|{}是什么颜色？|谁发明了{}？
我喜欢{}。|{}和{}有什么区别？""",
    "es": """¿Qué es un {}?|¿Quién es {}?|Háblame de {}.|¿Dónde está el {}?|¿Hay un {}?|¿Cuántos {}s hay?
¿De qué color es el {}?|Me gusta el {}.|¿Para qué sirve un {}?|Explica {}.|¿Quién inventó el {}?""",
}
_FRAMES = {language: lines.replace("\n", "|") for language, lines in _FRAMES.items()}

_WORDS = {  # a line's end is part of what the vocabulary was learnt from; \ breaks a line for the eye alone
    "en": """dog cat car house tree river bank computer phone book music film city Paris London Einstein money time \
love war
history science physics planet moon sun water coffee bread apple banana train plane boat king queen doctor teacher \
school
football game engine camera window door table chair lamp shirt shoe hat bird fish horse lion garden flower mountain \
beach
weather rain snow summer winter president country language word story poem song dance paint cook drive write read \
run jump
old young fast slow happy sad large tiny famous person man woman child baby friend family robot model number letter \
answer
sandwich pizza recipe email website battery price market bicycle guitar piano castle dragon island theory virus gene \
atom""",
    "zh": """狗 猫 汽车 房子 树 河 电脑 手机 书 音乐 电影 北京 上海 钱 时间 爱 历史 科学 月亮 太阳 水 咖啡 面包 苹果 \
火车 飞机 国王 医生 老师 学校 足球 相机 门 桌子 鸟 鱼 马 花 山 天气 雨 雪 总统 国家 语言 故事 朋友 机器人""",
    "es": """perro gato coche casa árbol río ordenador libro música ciudad Madrid dinero tiempo amor guerra historia \
ciencia
luna sol agua café pan manzana tren avión barco rey médico maestro escuela fútbol cámara puerta mesa pájaro pez \
caballo flor
montaña playa lluvia nieve país idioma cuento amigo familia robot queso reloj teléfono jardín""",
}  # fmt: skip


def strange_question(language: str, random: Random) -> str:
    """A listed question, one put together, or one with words of random letters."""
    way = random.random()
    if way < 0.35:
        return random.choice(_FULL[language].split("|"))
    frame = random.choice(_FRAMES[language].split("|"))
    words = [random.choice(_WORDS[language].split()) for _ in range(2)]
    if way > 0.8 and language != "zh":
        words = [_nonsense(random) for _ in words]
    return frame.format(*words)


def every_text() -> list[str]:
    """All listed questions and frames, for the vocabulary."""
    lists = (_FULL, _FRAMES, _WORDS)
    return [part for texts in lists for line in texts.values() for part in line.replace("{}", "").split("|")]


def _nonsense(random: Random) -> str:
    return "".join(
        random.choice("bcdfghjklmnprstvwz") + random.choice("aeiou") + random.choice(["", "", "n", "r", "s", "t"])
        for _ in range(random.randint(1, 4))
    )
