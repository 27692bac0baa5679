"""The words of the nano model: what a product can be, what is said of each value, small talk.

All of it was written for this project. A value carries its English word and two clauses; the
clauses are what the sample data's style is made of, the first being the more common one.
"""

from typing import NamedTuple


class Value(NamedTuple):
    """One attribute value, its English word, and two clauses that praise it."""

    name: str
    english: str
    clause: str
    other_clause: str


class Kind(NamedTuple):
    """A sort of garment: how it is called, counted and named in English, and its own attributes."""

    name: str
    noun: str
    counter: str
    english: str
    shape_key: str
    keys: tuple[str, ...]


SHARED_KEYS = ("版型", "材质", "颜色", "风格", "图案")

KINDS = (
    Kind("上衣", "上衣", "件", "top", "衣样式", ("衣样式", "衣领型", "衣袖型", "衣款式")),
    Kind("裤", "裤子", "条", "trousers", "裤型", ("裤长", "裤型", "裤腰型", "裤口")),
    Kind("裙", "裙子", "条", "skirt", "裙型", ("裙型", "裙下摆", "裙长", "裙腰型")),
)

VALUES: dict[str, tuple[Value, ...]] = {
    "版型": (
        Value("宽松", "loose", "宽松版型藏肉又自在", "宽宽松松怎么坐都舒服"),
        Value("修身", "slim", "修身剪裁勾出好身段", "修身版型一穿就精神"),
        Value("显瘦", "flattering", "显瘦版型像轻了五斤", "显瘦效果谁穿谁知道"),
        Value("直筒", "straight", "直筒线条利落又挺拔", "直筒版型从不挑身材"),
    ),
    "材质": (
        Value("棉", "cotton", "棉料软得像一朵云", "棉质贴身一点不闷"),
        Value("麻", "linen", "麻料透气夏天不怕热", "麻的纹理越看越有味道"),
        Value("牛仔布", "denim", "牛仔布耐磨又百搭", "牛仔布洗几次更好看"),
        Value("真丝", "silk", "真丝滑溜溜的会发光", "真丝垂感好得没话说"),
        Value("羊毛", "wool", "羊毛厚实暖到心里", "羊毛裹上身寒风绕着走"),
        Value("雪纺", "chiffon", "雪纺轻飘飘走路带风", "雪纺薄薄一层仙气十足"),
        Value("针织", "knit", "针织弹力满满不勒人", "针织软糯得想抱一抱"),
        Value("皮", "leather", "皮料一上身气场全开", "皮质光泽又酷又高级"),
    ),
    "颜色": (
        Value("白色", "white", "白色干净得像初雪", "白白净净显得人好清爽"),
        Value("黑色", "black", "黑色耐看又显瘦", "黑色怎么搭都不出错"),
        Value("红色", "red", "红色一出场就是主角", "红红火火看着就开心"),
        Value("蓝色", "blue", "蓝色像把海风穿在身上", "蓝色安静又有点小清新"),
        Value("绿色", "green", "绿色一抹满眼都是春天", "绿油油的好像刚发的芽"),
        Value("黄色", "yellow", "黄色亮得像小太阳", "黄色暖暖的超有活力"),
        Value("粉色", "pink", "粉色甜得冒泡泡", "粉粉嫩嫩谁见谁心动"),
        Value("灰色", "grey", "灰色低调里藏着讲究", "灰色高级得不用解释"),
        Value("紫色", "purple", "紫色神秘又带点贵气", "紫色像傍晚的一朵云霞"),
        Value("米色", "beige", "米色温温柔柔像牛奶", "米色上身气质立刻软下来"),
    ),
    "风格": (
        Value("简约", "minimal", "简约设计一眼不会腻", "简简单单反而最出彩"),
        Value("复古", "retro", "复古味道像老电影", "复古腔调拍照特别上镜"),
        Value("性感", "sexy", "性感得恰到好处", "小性感藏在细节里"),
        Value("休闲", "casual", "休闲随性周末就穿它", "休闲得让人想去散步"),
        Value("甜美", "sweet", "甜美指数直接拉满", "甜美得像刚出炉的蛋糕"),
        Value("街头", "street", "街头范儿走哪都有人问", "街头气息又帅又拽"),
        Value("通勤", "office", "通勤上班体面又省心", "通勤穿它老板都点头"),
        Value("文艺", "artsy", "文艺气质自带书香", "文艺得想去海边写诗"),
        Value("运动", "sporty", "运动起来毫无负担", "运动感十足跑跳都行"),
    ),
    "图案": (
        Value("条纹", "striped", "条纹拉长身形有一套", "条纹整整齐齐看着舒心"),
        Value("格子", "checked", "格子经典到永不过时", "格子里都是学院的味道"),
        Value("碎花", "floral", "碎花像把花园搬回家", "小碎花点点都是浪漫"),
        Value("波点", "dotted", "波点俏皮得想转圈圈", "一颗颗波点会跳舞"),
        Value("纯色", "plain", "纯色干脆搭什么都行", "纯色不吵不闹最安心"),
        Value("刺绣", "embroidered", "刺绣一针一线全是心思", "刺绣精致得想凑近看"),
        Value("字母", "lettered", "字母印花潮味刚刚好", "字母图案一看就很会玩"),
        Value("卡通", "cartoon", "卡通图案童心跑出来了", "卡通小人看一眼就想笑"),
        Value("线条", "lined", "线条图案利落有个性", "几笔线条画出高级感"),
    ),
    "衣样式": (
        Value("外套", "coat", "随手一披就很有型", "早晚降温全靠它"),
        Value("衬衫", "shirt", "扣好扣子马上像大人", "敞开穿也一样好看"),
        Value("卫衣", "hoodie", "套上就能出门撒欢", "懒人衣柜少不了它"),
        Value("毛衣", "sweater", "冬天有它就不想脱", "往里一钻整个人都暖了"),
        Value("风衣", "trench coat", "风一吹衣角都有故事", "走起路来像在走秀"),
        Value("西装", "blazer", "肩线一撑帅气十足", "见客户约会都能穿"),
    ),
    "衣领型": (
        Value("圆领", "round neck", "圆领乖巧不勒脖子", "圆圆的领口很减龄"),
        Value("翻领", "lapel", "翻领一翻精神百倍", "翻领显脸小是真的"),
        Value("立领", "stand collar", "立领挺挺的显脖子长", "立领一竖冷风别想进"),
        Value("方领", "square neck", "方领露出漂亮锁骨", "方领有点宫廷的意思"),
    ),
    "衣袖型": (
        Value("泡泡袖", "puff sleeves", "泡泡袖像两朵小蘑菇", "泡泡袖遮住手臂肉肉"),
        Value("喇叭袖", "bell sleeves", "喇叭袖一抬手好优雅", "喇叭袖随风轻轻晃"),
        Value("长袖", "long sleeves", "长袖遮阳又保暖", "长袖卷起来也好看"),
        Value("短袖", "short sleeves", "短袖清凉胳膊不闷", "短袖一穿夏天就来了"),
    ),
    "衣款式": (
        Value("口袋", "pockets", "大口袋手机零食都装下", "口袋又多又深真实用"),
        Value("拉链", "a zip", "拉链顺滑穿脱不费劲", "拉链一拉干脆利落"),
        Value("纽扣", "buttons", "纽扣颗颗都像小糖果", "纽扣结实不怕掉"),
        Value("连帽", "a hood", "帽子一戴酷到不行", "帽子挡风还显脸小"),
    ),
    "裤长": (
        Value("长裤", "full-length", "长度刚好盖住脚踝", "一路垂到脚面好显高"),
        Value("九分裤", "ankle-length", "九分长度露出细脚踝", "九分刚刚好配鞋不愁"),
        Value("七分裤", "cropped", "七分长度清爽不拖沓", "七分一截小腿真轻快"),
        Value("短裤", "short", "短短一截全是大长腿", "短到刚好凉快极了"),
    ),
    "裤型": (
        Value("阔腿裤", "wide-leg trousers", "裤管一甩两米气场", "腿型怎样都能藏住"),
        Value("牛仔裤", "jeans", "一年四季都离不开", "配什么鞋子都顺眼"),
        Value("哈伦裤", "harem trousers", "上松下紧最会修饰腿", "蹲下起立都不怕"),
        Value("铅笔裤", "pencil trousers", "小腿细得像铅笔一样", "塞进靴子里刚刚好"),
        Value("工装裤", "cargo trousers", "一身本事说干就干", "爬山下海它都陪着"),
        Value("背带裤", "dungarees", "肩带一挂回到十八岁", "蹦蹦跳跳也不会掉"),
    ),
    "裤腰型": (
        Value("高腰", "high waist", "高腰一提腿长一米八", "高腰收住小肚子"),
        Value("松紧腰", "elastic waist", "松紧腰吃撑了也不怕", "松紧腰一拉就穿好"),
        Value("中腰", "mid waist", "中腰舒服不卡肚子", "中腰高度刚好不尴尬"),
        Value("系带", "drawstring waist", "系带一拉松紧随你", "系带打个结好俏皮"),
    ),
    "裤口": (
        Value("卷边", "rolled cuffs", "卷边露出一点小心机", "卷边两圈就很时髦"),
        Value("毛边", "raw hems", "毛边有种不羁的帅", "毛边随意得刚刚好"),
        Value("微喇", "flared hems", "微喇裤脚走路像跳舞", "微喇一点小腿更修长"),
        Value("收口", "cuffed ankles", "收口干练跑步不绊脚", "收口一束裤脚不乱跑"),
    ),
    "裙型": (
        Value("百褶裙", "pleated skirt", "转个圈就是一朵花", "褶子一层层像翻书"),
        Value("半身裙", "half skirt", "配上衣随便挑随便换", "上班约会两不误"),
        Value("鱼尾裙", "mermaid skirt", "走起来像小美人鱼", "曲线美得不像话"),
        Value("吊带裙", "slip dress", "细细肩带凉快又撩人", "外面披一件也很美"),
        Value("旗袍", "qipao", "一穿就有老上海味道", "侧影美得像一幅画"),
        Value("公主裙", "princess dress", "今天就当一回小公主", "蓬蓬的裙摆好想转圈"),
    ),
    "裙下摆": (
        Value("荷叶边", "ruffled hem", "荷叶边一圈圈像浪花", "荷叶边给它添了俏皮"),
        Value("压褶", "pressed pleats", "压褶细密不怕坐皱", "压褶一走一晃好灵动"),
        Value("开叉", "side slit", "开叉露腿不露心机", "开叉一步一个风情"),
        Value("不规则", "uneven hem", "不规则下摆偏不听话", "不规则剪裁最有主意"),
    ),
    "裙长": (
        Value("长裙", "long", "长长裙摆扫过一路风", "长到脚踝好温柔"),
        Value("短裙", "short", "短短的裙子跑得飞快", "短一点腿就长一点"),
        Value("中长裙", "midi", "中长长度遮肉刚刚好", "中长一款端庄又大方"),
        Value("超短裙", "mini", "超短一截青春无敌", "超短穿出夏天的胆量"),
    ),
    "裙腰型": (
        Value("收腰", "nipped waist", "收腰一掐小蛮腰就有了", "收腰位置踩得真准"),
        Value("抽褶", "gathered waist", "抽褶腰身藏住小肚腩", "抽褶一收层次就来了"),
        Value("腰带", "belt", "腰带一系比例全对了", "腰带松紧自己说了算"),
        Value("低腰", "low waist", "低腰设计慵懒又随性", "低腰一穿千禧年回来了"),
    ),
}

# What each attribute is called inside a sentence, and in English.
SPOKEN_KEYS = {
    "版型": ("版型", "fit"),
    "材质": ("面料", "fabric"),
    "颜色": ("颜色", "colour"),
    "风格": ("风格", "style"),
    "图案": ("图案", "pattern"),
    "衣样式": ("款式", "shape"),
    "衣领型": ("领子", "neck"),
    "衣袖型": ("袖子", "sleeves"),
    "衣款式": ("细节", "detail"),
    "裤长": ("裤长", "length"),
    "裤型": ("款式", "shape"),
    "裤腰型": ("腰部", "waist"),
    "裤口": ("裤脚", "hem"),
    "裙型": ("款式", "shape"),
    "裙下摆": ("下摆", "hem"),
    "裙长": ("裙长", "length"),
    "裙腰型": ("腰部", "waist"),
}

# Small talk, so that a chat says something sensible: the ways to say it, and the one answer.
SMALL_TALK: tuple[tuple[tuple[str, ...], str], ...] = (
    (
        ("你好", "你好！", "您好", "嗨", "哈喽"),
        "你好，我是会写商品文案的小模型，给我一串属性试试吧。",
    ),
    (("早上好", "早安", "早"), "早上好，新的一天从一件好看的衣服开始。"),
    (("晚上好", "晚安"), "晚上好，忙了一天，早点休息。"),
    (
        ("你是谁", "你是谁？", "你叫什么名字？", "介绍一下你自己"),
        "我是一个很小的语言模型，只会写衣服、裤子和裙子的文案。",
    ),
    (
        ("你会什么", "你会做什么？", "你能帮我做什么？"),
        "我能列出商品属性，也能用活泼、正式、文艺、亲切、简洁的语气写文案。",
    ),
    (("怎么用", "怎么用你？", "我该怎么问？"), "请输入类似“类型#裤*版型#宽松”的内容，我来写。"),
    (("谢谢", "谢谢你", "多谢", "太感谢了"), "不客气，很高兴帮到你。"),
    (("再见", "拜拜", "下次见", "我走了"), "再见，欢迎下次再来。"),
    (("你真棒", "写得真好", "好厉害"), "谢谢夸奖，我会继续努力的。"),
    (("写得不好", "不喜欢", "太差了"), "对不起，换一种语气我再写一次好吗？"),
    (("今天天气怎么样", "明天会下雨吗？", "外面冷吗？"), "我看不到天气，出门前请看看天气预报。"),
    (("现在几点", "今天星期几？", "今天几号？"), "我没有钟表，也没有日历，抱歉。"),
    (("讲个笑话", "说个笑话吧", "逗我笑一下"), "裤子对裙子说：你怎么没有腿？裙子说：我有风。"),
    (("我心情不好", "我很难过", "今天好累"), "抱抱你，穿一件喜欢的衣服出去走走吧。"),
    (("我很开心", "今天真高兴", "太好了"), "真为你高兴，这样的日子要穿得好看一点。"),
    (("你喜欢什么颜色？", "你最喜欢的颜色是什么"), "我喜欢白色，因为它和什么都好搭。"),
    (("你多大了", "你有多大？", "你几岁？"), "我只有两百万个参数，是模型里的小不点。"),
    (("你是人吗", "你是机器人吗？", "你是真人吗"), "我不是人，是一个语言模型。"),
    (("一加一等于几", "一加一是多少？", "1+1=?"), "等于二，再难的题我就不会了。"),
    (
        ("hello", "hi", "Hello!", "good morning"),
        "Hello, I am a small model that writes about clothes.",
    ),
    (
        ("who are you", "who are you?", "what are you?"),
        "I am a tiny language model for product texts.",
    ),
    (("thank you", "thanks", "thanks!"), "You are welcome."),
    (("bye", "goodbye", "see you"), "Goodbye, see you next time."),
)
