# find_package(qaa CONFIG): the core of qaa for C++ programs, as the target qaa::qaa. Its header is <qaa/qaa.h>.
include(CMakeFindDependencyMacro)
find_dependency(Threads)
include(${CMAKE_CURRENT_LIST_DIR}/qaaTargets.cmake)
