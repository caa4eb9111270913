import Foundation
import Gemma3

// gemma3-ask MODEL PROMPT [PICTURE…]: the answer on standard output as it comes, then how it ended.

/// The bytes of a file; an error names it.
func picture(_ path: String) throws -> Data {
    guard let data = FileManager.default.contents(atPath: path) else { throw Unreadable(path: path) }
    return data
}

struct Unreadable: LocalizedError {
    let path: String
    var errorDescription: String? { "\(path): no file that can be read" }
}

let arguments = CommandLine.arguments.dropFirst()
guard arguments.count >= 2 else {
    FileHandle.standardError.write(Data("usage: gemma3-ask MODEL PROMPT [PICTURE ...]\n".utf8))
    exit(2)
}
do {
    let pictures = try arguments.dropFirst(2).map(picture)
    let engine = try await Gemma3Engine(arguments[1])
    for try await event in engine.answer(arguments[2], pictures: pictures) {
        switch event {
        case .progress: break
        case .text(let text): FileHandle.standardOutput.write(Data(text.utf8))
        case .done(_, let reason, let read, let written):
            print("\n[\(reason): \(read) tokens read, \(written) written]")
        }
    }
    try await engine.close()
} catch {
    FileHandle.standardError.write(Data("gemma3-ask: \(error.localizedDescription)\n".utf8))
    exit(1)
}
