"""Documents that were read, on disk: opened at once in place of being read again. Nothing here prints.

A model reads a document once. Its keys, values and index keys lie in a file, and a session maps that file: a decoding
step scans the index keys, which are small, and reads only the selected rows of K and V.
"""

from dsa.store.binding import Binding, binding_of
from dsa.store.folder import Damaged, Store, default_folder
from dsa.store.kept import ModelStore
from dsa.store.opening import Opened

__all__ = ["Binding", "Damaged", "ModelStore", "Opened", "Store", "binding_of", "default_folder"]
