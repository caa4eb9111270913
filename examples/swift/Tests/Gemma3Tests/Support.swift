import Foundation
import XCTest

@testable import Gemma3

/// A picture of examples/pictures.
func picture(_ name: String) throws -> Data {
    let examples = URL(fileURLWithPath: #filePath).pathComponents.dropLast(4).joined(separator: "/").dropFirst()
    return try Data(contentsOf: URL(fileURLWithPath: "\(examples)/pictures/\(name).png"))
}

/// The demo model for one test: closed at its end, also where the test fails.
func withDemo(_ body: (Gemma3Engine) async throws -> Void) async throws {
    let engine = try await Gemma3Engine("demo")
    do {
        try await body(engine)
    } catch {
        try? await engine.close()
        throw error
    }
    try await engine.close()
}

extension Gemma3Options {
    /// The likeliest token always.
    static var greedy: Gemma3Options {
        var options = Gemma3Options()
        options.temperature = 0
        return options
    }

    /// An answer that does not end before `tokens`: <eos> and <end_of_turn> are never taken.
    static func long(_ tokens: Int) -> Gemma3Options {
        var options = Gemma3Options.greedy
        options.maxTokens = tokens
        options.logitBias = [1: -100, 5: -100]
        return options
    }
}

/// An answer, read to its end.
struct Whole {
    var pieces: [String] = []
    var text = ""
    var reason = ""
    var promptTokens = 0
    var completionTokens = 0

    init(_ answer: Gemma3Answer) async throws {
        for try await event in answer {
            switch event {
            case .progress: break
            case .text(let text): pieces.append(text)
            case .done(let text, let reason, let read, let written):
                (self.text, self.reason, promptTokens, completionTokens) = (text, reason, read, written)
            }
        }
    }
}

/// The code of the error that something throws.
func code(_ body: () async throws -> Void) async -> String {
    do {
        try await body()
        return "no error"
    } catch let error as Gemma3Error {
        XCTAssertFalse(error.message.isEmpty)
        XCTAssertFalse(error.message.contains("\n"), error.message)
        return error.code
    } catch {
        return "\(error)"
    }
}

/// Memory of this process in bytes.
func residentBytes() throws -> Int {
    #if canImport(Darwin)
        var info = task_vm_info_data_t()
        var count = mach_msg_type_number_t(MemoryLayout<task_vm_info_data_t>.size / MemoryLayout<natural_t>.size)
        let status = withUnsafeMutablePointer(to: &info) {
            $0.withMemoryRebound(to: integer_t.self, capacity: Int(count)) {
                task_info(mach_task_self_, task_flavor_t(TASK_VM_INFO), $0, &count)
            }
        }
        XCTAssertEqual(status, KERN_SUCCESS)
        return Int(info.phys_footprint)
    #else
        let fields = try String(contentsOfFile: "/proc/self/statm", encoding: .utf8).split(separator: " ")
        return Int(fields[1])! * sysconf(Int32(_SC_PAGESIZE))
    #endif
}
