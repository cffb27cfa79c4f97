"""The mark of pictures that a model has made, for the sheets that training and evaluation write.

The mark is XMP metadata (IPTC `DigitalSourceType`), which platforms look for; it leaves the pixels unchanged.
"""

from pathlib import Path

from PIL import Image
from PIL.PngImagePlugin import PngInfo

AI_MADE = "http://cv.iptc.org/newscodes/digitalsourcetype/trainedAlgorithmicMedia"
XMP = (
    '<?xpacket begin="\ufeff" id="W5M0MpCehiHzreSzNTczkc9d"?>'
    '<x:xmpmeta xmlns:x="adobe:ns:meta/">'
    '<rdf:RDF xmlns:rdf="http://www.w3.org/1999/02/22-rdf-syntax-ns#">'
    '<rdf:Description rdf:about="" xmlns:Iptc4xmpExt="http://iptc.org/std/Iptc4xmpExt/2008-02-29/"'
    f' Iptc4xmpExt:DigitalSourceType="{AI_MADE}"/>'
    "</rdf:RDF></x:xmpmeta>"
    '<?xpacket end="w"?>'
)


def save_png(image: Image.Image, path: Path, *, optimize: bool = False) -> None:
    """Write a marked PNG, and the folder that it is in."""
    texts = PngInfo()
    texts.add_itxt("XML:com.adobe.xmp", XMP)
    path.parent.mkdir(parents=True, exist_ok=True)
    image.save(path, "PNG", pnginfo=texts, optimize=optimize)
