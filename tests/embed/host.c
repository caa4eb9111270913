/* A host application as PythonKit makes one: libpython is loaded at run time, and the thread that calls holds the GIL.

   host LIBPYTHON FOLDER PICTURE REQUESTS THREADS SEED ENDING

   First one thread does an eighth of the requests as PythonKit would: it never lets go of the GIL, sleeps with it
   between two polls, and only `stream.next(timeout)` lets the engine's thread run. Then THREADS threads do the rest,
   each taking the GIL for several calls at a time. Requests are read to their end, cancelled at random, dropped, or
   wrong on purpose. A watchdog aborts when no request has ended for a minute.

   ENDING, each with an answer in work: "close" closes the engine and finalizes Python; "finalize" only finalizes;
   "leave" closes the engine and returns from main, as an application does: PythonKit never finalizes.

   On stdout: one JSON object with counts and resident bytes, after a fifth of the requests and after all. */

#include <dlfcn.h>
#include <pthread.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/resource.h>
#include <time.h>
#include <unistd.h>

typedef void *Object;

#define SYMBOLS(X)                                                                                                     \
    X(void, Py_Initialize, (void))                                                                                     \
    X(int, Py_FinalizeEx, (void))                                                                                      \
    X(void, Py_IncRef, (Object))                                                                                       \
    X(void, Py_DecRef, (Object))                                                                                       \
    X(int, PyRun_SimpleString, (const char *))                                                                         \
    X(Object, PyImport_ImportModule, (const char *))                                                                   \
    X(Object, PyObject_GetAttrString, (Object, const char *))                                                          \
    X(Object, PyObject_Call, (Object, Object, Object))                                                                 \
    X(Object, PyObject_GetItem, (Object, Object))                                                                      \
    X(Object, PyTuple_New, (ssize_t))                                                                                  \
    X(int, PyTuple_SetItem, (Object, ssize_t, Object))                                                                 \
    X(Object, PyList_New, (ssize_t))                                                                                   \
    X(int, PyList_SetItem, (Object, ssize_t, Object))                                                                  \
    X(Object, PyDict_New, (void))                                                                                      \
    X(int, PyDict_SetItemString, (Object, const char *, Object))                                                       \
    X(Object, PyUnicode_FromString, (const char *))                                                                    \
    X(const char *, PyUnicode_AsUTF8, (Object))                                                                        \
    X(Object, PyBytes_FromStringAndSize, (const char *, ssize_t))                                                      \
    X(Object, PyFloat_FromDouble, (double))                                                                            \
    X(Object, PyLong_FromLong, (long))                                                                                 \
    X(long, PyLong_AsLong, (Object))                                                                                   \
    X(Object, PyErr_Occurred, (void))                                                                                  \
    X(void, PyErr_Print, (void))                                                                                       \
    X(void, PyErr_Clear, (void))                                                                                       \
    X(Object, PyEval_SaveThread, (void))                                                                               \
    X(void, PyEval_RestoreThread, (Object))                                                                            \
    X(int, PyGILState_Ensure, (void))                                                                                  \
    X(void, PyGILState_Release, (int))

#define DECLARE(result, name, arguments) static result(*name) arguments;
SYMBOLS(DECLARE)

enum { READ, CANCEL, DROP, WRONG_PICTURE, WRONG_OPTION, KINDS };
static const char *KIND_NAMES[KINDS] = {"read", "cancelled", "dropped", "wrong_picture", "wrong_option"};

static Object engine;
static char *picture;
static long picture_size;
static atomic_long taken, ended, counts[KINDS], warm_bytes;
static long requests, warm_at;

static void fail(const char *what) {
    fprintf(stderr, "host: %s\n", what);
    if (PyErr_Occurred && PyErr_Occurred())
        PyErr_Print();
    abort();
}

static Object need(Object object, const char *what) {
    if (!object)
        fail(what);
    return object;
}

static long resident_bytes(void) {
#ifdef __linux__
    long pages = 0, resident = 0;
    FILE *file = fopen("/proc/self/statm", "r");
    if (!file || fscanf(file, "%ld %ld", &pages, &resident) != 2)
        resident = 0;
    if (file)
        fclose(file);
    return resident * sysconf(_SC_PAGESIZE);
#else
    struct rusage usage; /* the peak: it must not grow either */
    getrusage(RUSAGE_SELF, &usage);
    return usage.ru_maxrss;
#endif
}

static void set(Object dict, const char *name, Object value) {
    if (PyDict_SetItemString(dict, name, need(value, name)))
        fail(name);
    Py_DecRef(value);
}

/* object.name(first, **options); first is NULL for no argument. Steals first and options. */
static Object call(Object object, const char *name, Object first, Object options) {
    Object method = need(PyObject_GetAttrString(object, name), name);
    Object arguments = need(PyTuple_New(first ? 1 : 0), "tuple");
    if (first)
        PyTuple_SetItem(arguments, 0, first);
    Object result = PyObject_Call(method, arguments, options);
    Py_DecRef(method);
    Py_DecRef(arguments);
    if (options)
        Py_DecRef(options);
    return result;
}

/* The text of event[name]; into `text`, so that the event may go. */
static void field(Object event, const char *name, char *text, size_t size) {
    Object key = need(PyUnicode_FromString(name), "key");
    Object value = need(PyObject_GetItem(event, key), name);
    snprintf(text, size, "%s", PyUnicode_AsUTF8(value));
    Py_DecRef(key);
    Py_DecRef(value);
}

static Object start(int kind, unsigned *seed, int tokens) {
    Object options = need(PyDict_New(), "dict");
    char prompt[64];
    snprintf(prompt, sizeof prompt, "the model %u", rand_r(seed) % 50);
    set(options, "max_tokens", PyLong_FromLong(tokens));
    set(options, "temperature", PyFloat_FromDouble(rand_r(seed) % 2));
    if (kind == WRONG_OPTION)
        set(options, "top_k", PyUnicode_FromString("many"));
    if (kind == WRONG_PICTURE || rand_r(seed) % 8 == 0) {
        Object images = need(PyList_New(1), "list");
        long size = kind == WRONG_PICTURE ? picture_size / 3 : picture_size;
        PyList_SetItem(images, 0, need(PyBytes_FromStringAndSize(picture, size), "bytes"));
        set(options, "images", images);
    }
    return call(engine, "stream", PyUnicode_FromString(prompt), options);
}

/* One poll; returns whether the stream has ended, with how in `end`. */
static int poll(Object stream, double timeout, char *end, size_t size) {
    Object event = need(call(stream, "next", PyFloat_FromDouble(timeout), NULL), "next");
    char kind[16];
    field(event, "kind", kind, sizeof kind);
    int last = !strcmp(kind, "done") || !strcmp(kind, "error");
    if (last)
        field(event, !strcmp(kind, "done") ? "finish_reason" : "code", end, size);
    Py_DecRef(event);
    return last;
}

/* A while of other work, without letting go of the GIL where it is held. */
static void work(unsigned *seed) { usleep(rand_r(seed) % 3000); }

static void one_request(unsigned *seed, int release) {
    int kind = rand_r(seed) % 16, gil = release ? PyGILState_Ensure() : 0;
    kind = kind < 7 ? READ : kind < 12 ? CANCEL : kind < 14 ? DROP : kind < 15 ? WRONG_PICTURE : WRONG_OPTION;
    Object stream = start(kind, seed, kind == CANCEL ? 400 : 1 + rand_r(seed) % 8);
    if (kind == WRONG_OPTION) { /* raised where it was asked for, as PythonKit's `throwing` expects */
        if (stream || !PyErr_Occurred())
            fail("a wrong option was taken");
        PyErr_Clear();
    } else {
        need(stream, "stream");
        char end[32] = "";
        int polls = rand_r(seed) % 6, over = 0;
        while (!over && !(kind == DROP && polls < 0)) {
            if (kind == CANCEL && polls == 0)
                Py_DecRef(need(call(stream, "cancel", NULL, NULL), "cancel"));
            over = poll(stream, (rand_r(seed) % 3) * 0.01, end, sizeof end);
            polls--;
            work(seed);
            if (release && rand_r(seed) % 2) {
                PyGILState_Release(gil);
                work(seed);
                gil = PyGILState_Ensure();
            }
        }
        if (kind == WRONG_PICTURE ? strcmp(end, "image") : kind != DROP && !strcmp(end, "error"))
            fail(end);
        Py_DecRef(stream);
    }
    if (release)
        PyGILState_Release(gil);
    atomic_fetch_add(&counts[kind], 1);
    if (atomic_fetch_add(&ended, 1) + 1 == warm_at)
        warm_bytes = resident_bytes();
}

static void *thread(void *given) {
    unsigned seed = (unsigned)(size_t)given;
    while (atomic_fetch_add(&taken, 1) < requests)
        one_request(&seed, 1);
    return NULL;
}

static void *watch(void *unused) {
    (void)unused;
    long seen = -1;
    for (int quiet = 0; quiet < 60; quiet++) {
        sleep(1);
        if (ended != seen)
            quiet = 0;
        seen = ended;
    }
    fprintf(stderr, "host: nothing has ended for a minute, %ld requests had\n", seen);
    abort(); /* PYTHONFAULTHANDLER=1 writes every thread's stack */
}

static char *read_file(const char *path, long *size) {
    FILE *file = fopen(path, "rb");
    if (!file || fseek(file, 0, SEEK_END))
        fail(path);
    *size = ftell(file);
    rewind(file);
    char *bytes = malloc((size_t)*size);
    if (!bytes || fread(bytes, 1, (size_t)*size, file) != (size_t)*size)
        fail(path);
    fclose(file);
    return bytes;
}

int main(int count, char **arguments) {
    if (count != 8)
        return 2;
    /* RTLD_GLOBAL as PythonKit has it: extension modules look for Python's symbols there */
    void *library = dlopen(arguments[1], RTLD_LAZY | RTLD_GLOBAL);
    if (!library) {
        fprintf(stderr, "host: %s\n", dlerror());
        return 2;
    }
#define LOAD(result, name, types)                                                                                      \
    if (!(*(void **)&name = dlsym(library, #name)))                                                                    \
        return 2;
    SYMBOLS(LOAD)
    picture = read_file(arguments[3], &picture_size);
    requests = atol(arguments[4]);
    long threads = atol(arguments[5]);
    unsigned seed = (unsigned)atol(arguments[6]);
    const char *ending = arguments[7];
    warm_at = requests / 5;

    Py_Initialize();
    PyRun_SimpleString("import sys; sys.argv = ['']"); /* PythonKit does it too */
    Object module = need(PyImport_ImportModule("mlx_gemma3"), "import mlx_gemma3");
    engine = need(call(module, "load", PyUnicode_FromString(arguments[2]), NULL), "load");
    pthread_t watchdog, *running = calloc((size_t)threads, sizeof *running);
    pthread_create(&watchdog, NULL, watch, NULL);

    while (atomic_fetch_add(&taken, 1) < requests / 8)
        one_request(&seed, 0);
    taken = requests / 8;
    Object state = PyEval_SaveThread();
    for (long n = 0; n < threads; n++)
        pthread_create(&running[n], NULL, thread, (void *)(size_t)(seed + n + 1));
    for (long n = 0; n < threads; n++)
        pthread_join(running[n], NULL);
    PyEval_RestoreThread(state);

    /* One more request; then no stream of those that were dropped may be left, as soon as their threads ended. */
    Object last = need(start(READ, &seed, 1), "the last request");
    char end[32];
    while (!poll(last, 0.1, end, sizeof end))
        ;
    Py_DecRef(last);
    long end_bytes = resident_bytes();
    if (PyRun_SimpleString("import gc, time\n"
                           "until, left = time.monotonic() + 10, [None]\n"
                           "while left and time.monotonic() < until:\n"
                           "    time.sleep(0.05), gc.collect()\n"
                           "    left = [o for o in gc.get_objects() if type(o).__name__ in ('Stream', 'Request')]\n"
                           "assert not left, left"))
        fail("streams are left");
    printf("{\"requests\": %ld, \"warm_bytes\": %ld, \"end_bytes\": %ld", (long)ended, (long)warm_bytes, end_bytes);
    for (int kind = 0; kind < KINDS; kind++)
        printf(", \"%s\": %ld", KIND_NAMES[kind], (long)counts[kind]);
    printf("}\n");
    fflush(stdout);

    Object busy = need(start(READ, &seed, 900), "the busy request");
    poll(busy, 0.05, end, sizeof end);
    if (strcmp(ending, "finalize"))
        Py_DecRef(need(call(engine, "close", NULL, NULL), "close"));
    Py_DecRef(busy);
    Py_DecRef(engine);
    Py_DecRef(module);
    free(running);
    free(picture);
    if (strcmp(ending, "leave") && Py_FinalizeEx())
        fail("finalize");
    return 0;
}
