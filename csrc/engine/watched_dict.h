// Whether a dict still holds the very objects that it held when it was last looked at.
#pragma once

#include <Python.h>
#include <pybind11/pybind11.h>

#include <algorithm>
#include <utility>
#include <vector>

namespace fusestep::engine {

class WatchedDict {
 public:
  enum class Watch { key, value, kept_value };

  // `watch(key)` says what must stay the same. A value that is not kept alive may be freed, and
  // another object get its address: that is enough for tensors, which are asked where their memory
  // is, and lets go of memory that users have moved elsewhere. A kept one is told apart for
  // certain.
  template <class WatchKey>
  WatchedDict(PyObject* dict, WatchKey watch) : dict_(dict) {
    Py_ssize_t position = 0;
    PyObject *key, *value;
    while (PyDict_Next(dict, &position, &key, &value)) {
      Entry& entry = entries_.emplace_back();
      entry.key = pybind11::reinterpret_borrow<pybind11::object>(key);
      const Watch how = watch(key);
      if (how != Watch::key) entry.value = value;
      if (how == Watch::kept_value)
        entry.kept = pybind11::reinterpret_borrow<pybind11::object>(value);
    }
  }

  // True where the value of a watched key is this object.
  bool watches(PyObject* value) const {
    return std::any_of(entries_.begin(), entries_.end(),
                       [&](const Entry& entry) { return entry.value == value; });
  }

  // True where `dict` is the same dict, with the same keys in the same order, and the values that
  // are watched are the same objects. Calls visit(key, value) for those that are not watched.
  template <class Visit>
  bool is_unchanged(PyObject* dict, Visit visit) const {
    if (dict != dict_ || PyDict_GET_SIZE(dict) != static_cast<Py_ssize_t>(entries_.size()))
      return false;
    Py_ssize_t position = 0;
    PyObject *key, *value;
    for (const Entry& entry : entries_) {
      if (!PyDict_Next(dict, &position, &key, &value) || key != entry.key.ptr()) return false;
      if (!entry.value)
        visit(key, value);
      else if (value != entry.value)
        return false;
    }
    return true;
  }

 private:
  struct Entry {
    pybind11::object key;
    PyObject* value = nullptr;
    pybind11::object kept;
  };
  PyObject* dict_;
  std::vector<Entry> entries_;
};

}  // namespace fusestep::engine
