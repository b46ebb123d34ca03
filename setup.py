from setuptools import find_namespace_packages, setup

# The recipes lie at the top of the repository, where people look for them, and in the package once it is installed.
setup(
    packages=[*find_namespace_packages(include=["bd3_scale", "bd3_scale.*"]), "bd3_scale.recipes"],
    package_dir={"bd3_scale.recipes": "recipes"},
)
