"""Everything that packaging needs to know is in settings.ini, which nbdev reads too."""
from configparser import ConfigParser
from pathlib import Path
from setuptools import find_packages, setup

here = Path(__file__).parent
config = ConfigParser(delimiters=["="])
config.read(here/"settings.ini", encoding="utf-8")
cfg = config["DEFAULT"]
requirements = lambda key: cfg[key].split()

setup(
    name=cfg["lib_name"],
    version=cfg["version"],
    description=cfg["description"],
    long_description=(here/"README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    author=cfg["author"],
    keywords=cfg["keywords"].split(),
    packages=find_packages(include=["repopt", "repopt.*"]),
    package_data={"repopt": ["assets/*.yaml", "assets/recipes/*.yaml", "assets/scales/*", "assets/data/*"]},
    python_requires=">=" + cfg["min_python"],
    install_requires=requirements("requirements"),
    extras_require={"dev": requirements("dev_requirements")},
    zip_safe=False,
)
