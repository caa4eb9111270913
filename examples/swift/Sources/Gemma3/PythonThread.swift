import Foundation
import PythonKit

/// The one thread that touches Python.
///
/// PythonKit starts Python in the thread that calls it first, and that thread holds the interpreter's lock from then
/// on: a call from any other would crash. So every call goes through `run`, and no `PythonObject` leaves this thread.
final class PythonThread: @unchecked Sendable {
    static let shared = PythonThread()

    private let condition = NSCondition()
    private var jobs: [() -> Void] = []

    private init() {
        let thread = Thread { PythonThread.shared.work() }
        thread.name = "Python"
        thread.stackSize = 16 << 20  // Python recurses deeper than the 512 KiB of a second thread
        thread.start()
    }

    /// Do something in the Python thread, after what was asked before. Python's errors are thrown as `Gemma3Error`.
    func run<Value: Sendable>(_ body: @escaping @Sendable () throws -> Value) async throws -> Value {
        try await withCheckedThrowingContinuation { (continuation: CheckedContinuation<Value, Error>) in
            add {
                do {
                    let value = try body()
                    continuation.resume(returning: value)
                } catch let error as PythonError {
                    continuation.resume(throwing: Gemma3Error(error))
                } catch {
                    continuation.resume(throwing: error)
                }
            }
        }
    }

    /// The same without waiting for it.
    func add(_ job: @escaping () -> Void) {
        condition.lock()
        jobs.append(job)
        condition.signal()
        condition.unlock()
    }

    private func work() {
        while true {
            condition.lock()
            while jobs.isEmpty { condition.wait() }
            let job = jobs.removeFirst()
            condition.unlock()
            #if canImport(ObjectiveC)
                autoreleasepool { job() }
            #else
                job()
            #endif
        }
    }
}

/// Start Python where it has not begun. It takes Ctrl-C for itself then; the application gets that back. In the Python
/// thread only.
func startPython() throws {
    do {
        try PythonLibrary.loadLibrary()
    } catch {
        throw Gemma3Error(
            code: "error",
            message: "Python: got no library, want libpython3; set PYTHON_LIBRARY to its path before the first model is loaded")
    }
    var interrupt = sigaction()
    sigaction(SIGINT, nil, &interrupt)
    _ = Python.None
    sigaction(SIGINT, &interrupt, nil)
}

/// A Python object that other threads may hold, but not look into: it is made, used and freed in the Python thread.
final class PythonBox: @unchecked Sendable {
    private final class Slot {
        var object: Result<PythonObject, Error>?
    }

    private let slot = Slot()

    /// `make` runs in the Python thread, before all that is asked of that thread from now on.
    init(_ make: @escaping @Sendable () throws -> PythonObject) {
        let slot = self.slot
        PythonThread.shared.add { slot.object = Result(catching: make) }
    }

    /// In the Python thread only. Throws what making it threw.
    func object() throws -> PythonObject { try slot.object!.get() }

    deinit {
        let slot = self.slot
        PythonThread.shared.add { slot.object = nil }
    }
}

/// One argument of a Python call; an empty key is a positional one.
typealias Argument = (key: String, value: PythonConvertible)

/// object.name(arguments). An error is thrown: without `throwing` PythonKit would end the application.
@discardableResult
func call(_ object: PythonObject, _ name: String, _ arguments: [Argument] = []) throws -> PythonObject {
    try object[dynamicMember: name].throwing.dynamicallyCall(withKeywordArguments: arguments)
}

/// What went wrong, as the Python package says it: `code` stays the same from version to version.
public struct Gemma3Error: LocalizedError, Sendable {
    public let code: String
    public let message: String

    public var errorDescription: String? { message }

    init(code: String, message: String) {
        self.code = code
        self.message = message
    }

    /// In the Python thread only.
    init(_ error: PythonError) {
        if case .exception(let exception, traceback: _) = error {
            code = exception.checking.code.flatMap { String($0) } ?? "error"
            message = exception.description
        } else {
            code = "error"
            message = error.description
        }
    }
}
