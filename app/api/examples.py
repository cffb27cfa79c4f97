"""Pictures for the runnable examples on /docs: 64x64 pixels, two colours, PNG, base64."""

# A red circle on a blue background.
PICTURE = (
    "iVBORw0KGgoAAAANSUhEUgAAAEAAAABAAQMAAACQp+OdAAAABlBMVEUePMjcHh7hToeiAAAAbUlEQVR42s3QsRGDQAxE0YdM"
    "QIQpgVJckjuA0iiFEi4kYDgH5wBmICDjR5r9UqDlebwTAt/2n+RckhcTQU1P0NARdDTlirLcUxN8iKMqVGRUJ+ruMJIv1MRG"
    "MLMeVWIhWEgEK/PuZRi2fS1P4we9mxVt0n1lfgAAAABJRU5ErkJggg=="
)

# White on the circle and a narrow margin around it.
MASK = (
    "iVBORw0KGgoAAAANSUhEUgAAAEAAAABAAQAAAACCEkxzAAAAeklEQVR42sXQsQ3CUAyE4e8ZCipgBDYhbMQIb7SMkBEYIQUF"
    "BYopokiJ9BqqXHXy/bZOZm9dRgSe53lQMitB0M1I5khw5URw4zhvYSGDQqKsowJ1Ay8moGtGf5kJ+kbU6qOSBD3T9uCLL8HI"
    "h+DNQDDRc4D7Y/W6ffUD0qUYfORLWBoAAAAASUVORK5CYII="
)

PICTURE_URI = f"data:image/png;base64,{PICTURE}"
MASK_URI = f"data:image/png;base64,{MASK}"
