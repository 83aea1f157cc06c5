#include "core/errors.h"

#include "bind/register.h"

namespace py = pybind11;

namespace fusestep::bind {

void register_errors(py::module_&) {
  py::register_local_exception_translator([](std::exception_ptr pointer) {
    try {
      if (pointer) std::rethrow_exception(pointer);
    } catch (const TypeError& error) {
      py::set_error(PyExc_TypeError, error.what());
    } catch (const ValueError& error) {
      py::set_error(PyExc_ValueError, error.what());
    } catch (const IndexError& error) {
      py::set_error(PyExc_IndexError, error.what());
    }
  });
}

}  // namespace fusestep::bind
